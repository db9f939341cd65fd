"""Batches that lie on the GPU: against stand-ins anywhere, with PyTorch, CuPy and pycuda where there is a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag.runtime import open_session
from asag.runtime.backends.device_memory import CudaDevice, DeviceArray, stream_handle
from asag.runtime.backends.onnxruntime_session import OnnxRuntimeSession
from asag.runtime.engines.backend import BACKENDS
from asag.runtime.engines.build import BuildOptions, build_engine
from asag.runtime.errors import BackendUnavailableError
from asag.runtime.postprocessing import OUTPUT_NAMES
from asag.runtime.session import Session
from tests.runtime.cuda_stand_in import ALLOCATIONS, SYNCHRONIZATIONS, StandInCuda
from tests.runtime.engine_stand_in import StandInMachine, assert_right, batch_of
from tests.runtime.toy_detector import ToySession

WAITS = (*SYNCHRONIZATIONS, "cudaEventSynchronize")


def interface(address: int, array: NDArray, **changes: Any) -> Any:
    """An object of no library in particular that describes memory on a GPU."""
    described = {"shape": array.shape, "typestr": array.dtype.str, "data": (address, False), "version": 3}
    return SimpleNamespace(__cuda_array_interface__=described | changes)


def on_device(cuda: StandInCuda, tensors: Mapping[str, NDArray]) -> dict[str, Any]:
    return {name: interface(cuda.to_device(array), array) for name, array in tensors.items()}


def read(cuda: StandInCuda, arrays: Mapping[str, DeviceArray]) -> dict[str, NDArray]:
    return {name: cuda.view(array.pointer, array.shape, array.dtype).copy() for name, array in arrays.items()}


def free(cuda: StandInCuda, arrays: Mapping[str, Any]) -> None:
    for array in arrays.values():
        cuda.cudaFree(array.__cuda_array_interface__["data"][0])


def test_results_follow_the_callers_stream_without_a_wait(machine: StandInMachine) -> None:
    session, cuda = machine.open(contexts=1), machine.cuda
    _, stream = cuda.cudaStreamCreateWithFlags(1)
    blank = on_device(cuda, {name: np.zeros_like(array) for name, array in batch_of(3).items()})
    for seed in range(4):
        tensors = batch_of(3, seed)

        def fill(tensors: dict[str, NDArray] = tensors) -> None:
            for name, array in tensors.items():
                cuda.view(blank[name].__cuda_array_interface__["data"][0], array.shape, array.dtype)[...] = array

        cuda.enqueue(stream, fill)
        cuda.calls.clear()
        found = session.run_on_device(blank, stream=SimpleNamespace(ptr=stream))
        assert not any(cuda.calls[name] for name in WAITS)
        assert {array.__cuda_array_interface__["stream"] for array in found.values()} == {stream}
        cuda.cudaStreamSynchronize(stream)
        assert_right(read(cuda, found), tensors)
    del found
    gc.collect()
    free(cuda, blank)
    cuda.cudaStreamDestroy(stream)


def test_inputs_that_name_their_stream_are_waited_for(machine: StandInMachine) -> None:
    session, cuda = machine.open(), machine.cuda
    _, stream = cuda.cudaStreamCreateWithFlags(1)
    tensors = batch_of(2)
    blank = cuda.to_device(np.zeros_like(tensors["images"]))
    cuda.enqueue(
        stream, lambda: np.copyto(cuda.view(blank, tensors["images"].shape, np.dtype(np.uint8)), tensors["images"])
    )
    given = on_device(cuda, {"sizes": tensors["sizes"]}) | {
        "images": interface(blank, tensors["images"], stream=stream)
    }
    found = session.run_on_device(given)
    assert {array.stream for array in found.values()} == {1}  # how the interface writes the default stream
    cuda.cudaStreamSynchronize(0)
    assert_right(read(cuda, found), tensors)
    del found
    gc.collect()
    free(cuda, given)
    cuda.cudaStreamDestroy(stream)


def test_results_go_where_the_caller_wants_them(machine: StandInMachine) -> None:
    session, cuda = machine.open(), machine.cuda
    tensors = batch_of(4)
    given = on_device(cuda, tensors)
    wanted = on_device(cuda, {name: np.zeros_like(array) for name, array in ToySession().run(tensors).items()})
    for round_ in range(3):
        cuda.calls.clear()
        found = session.run_on_device(given, wanted)
        assert not any(cuda.calls[name] for name in (*ALLOCATIONS, *WAITS)), round_
        for name in OUTPUT_NAMES:
            assert found[name].pointer == wanted[name].__cuda_array_interface__["data"][0]
        assert_right(session.run(batch_of(4, 9)), batch_of(4, 9))  # on the session's own buffers, in between
        cuda.cudaStreamSynchronize(0)
        assert_right(read(cuda, found), tensors)
    free(cuda, given)
    free(cuda, wanted)


def test_results_outlive_the_session_and_are_freed_with_their_arrays(machine: StandInMachine) -> None:
    session, cuda = machine.open(), machine.cuda
    given = on_device(cuda, batch_of(2))
    found = session.run_on_device(given)
    cuda.cudaStreamSynchronize(0)
    session.close()
    free(cuda, given)
    assert_right(read(cuda, found), batch_of(2))
    assert cuda.outstanding() == {"device": 4}
    del found
    gc.collect()
    assert cuda.outstanding() == {}


def test_arrays_that_do_not_fit(machine: StandInMachine) -> None:
    session, cuda = machine.open(), machine.cuda
    tensors = batch_of(2)
    given = on_device(cuda, tensors)
    address = given["images"].__cuda_array_interface__["data"][0]
    with pytest.raises(ValueError, match="images is no array on a GPU: ndarray has no __cuda_array_interface__"):
        session.run_on_device(tensors)
    with pytest.raises(ValueError, match=r"images must be row-major \(contiguous\)"):
        session.run_on_device(given | {"images": interface(address, tensors["images"], strides=(1, 2, 3, 4))})
    with pytest.raises(ValueError, match=r"images must be uint8 \[2, 3, 64, 96\], it is int8"):
        session.run_on_device(given | {"images": interface(address, tensors["images"], typestr="|i1")})
    with pytest.raises(ValueError, match="str is no CUDA stream"):
        session.run_on_device(given, stream="mine")
    wrong = on_device(cuda, {name: np.zeros((1, 1), np.float32) for name in OUTPUT_NAMES})
    with pytest.raises(ValueError, match=r"boxes must be float32 \[2, 16, 4\], it is float32 \[1, 1\]"):
        session.run_on_device(given, wrong)
    free(cuda, given)
    free(cuda, wrong)


def test_strides_of_axes_of_one_do_not_matter() -> None:
    images = np.zeros((1, 3, 4, 5), np.uint8)
    assert DeviceArray.of("images", interface(4096, images, strides=(999, 20, 5, 1))).shape == (1, 3, 4, 5)
    described = DeviceArray(4096, (2, 3), np.dtype(np.float32), 7).__cuda_array_interface__
    assert (described["version"], described["data"], described["typestr"]) == (3, (4096, False), "<f4")
    assert (described["shape"], described["stream"], described["strides"]) == ((2, 3), 7, None)


def test_streams_of_every_library() -> None:
    for stream in (7, SimpleNamespace(handle=7), SimpleNamespace(ptr=7), SimpleNamespace(cuda_stream=7)):
        assert stream_handle(stream) == 7


def test_sessions_on_the_cpu_take_no_device_arrays(toy_onnx: Path) -> None:
    for session in (ToySession(), open_session(toy_onnx)):
        with pytest.raises(ValueError, match="takes no arrays on a GPU; use run instead"):
            session.run_on_device({})


class HostMemorySession(OnnxRuntimeSession):
    """ONNX Runtime's own binding of inputs and outputs by address, in the host's memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, threads=1)
        self._memory = ("cpu", 0)

    def run_at(
        self, tensors: Mapping[str, NDArray], outputs: Mapping[str, Any] | None = None
    ) -> dict[str, DeviceArray]:
        arrays = {name: DeviceArray.of(name, interface(array.ctypes.data, array)) for name, array in tensors.items()}
        return self._run_bound(arrays, outputs)


def test_onnxruntime_runs_between_addresses(toy_onnx: Path) -> None:
    with HostMemorySession(toy_onnx) as session:
        tensors = batch_of(3)
        found = session.run_at(tensors)
        values = {name: np.array(array.owner.numpy()) for name, array in found.items()}
        assert_right(values, tensors)
        for name, array in found.items():
            assert (array.pointer, array.dtype) == (array.owner.data_ptr(), values[name].dtype)
        wanted = {name: np.zeros_like(value) for name, value in values.items()}
        described = {name: interface(array.ctypes.data, array) for name, array in wanted.items()}
        written = session.run_at(batch_of(3, 1), described)
        assert_right(wanted, batch_of(3, 1))
        assert written["boxes"].pointer == wanted["boxes"].ctypes.data
        with pytest.raises(ValueError, match=r"scores must be float32 \[3, 16\], it is float32 \[3, 16, 4\]"):
            session.run_at(tensors, described | {"scores": described["boxes"]})
        with pytest.raises(ValueError, match=r"sizes must be float32 \[3, 2\]"):
            session.run_at(tensors | {"sizes": np.zeros((3, 4), np.float32)})


@pytest.fixture(params=["onnxruntime-cuda", "tensorrt-rtx", "tensorrt"])
def gpu_session(request: pytest.FixtureRequest, toy_onnx: Path, tmp_path: Path) -> Iterator[Session]:
    """The toy detector on the GPU, through everything that may be installed beside it."""
    try:
        if request.param == "onnxruntime-cuda":
            session = open_session(toy_onnx, device="cuda")
        else:
            engine = tmp_path / "toy.engine"
            build_engine(toy_onnx, engine, BuildOptions(BACKENDS[request.param], batch=(1, 4)))
            session = open_session(engine)
    except BackendUnavailableError as error:
        pytest.skip(f"{request.param} does not run here: {error}")
    with session:
        yield session


@pytest.mark.gpu
def test_pytorch_tensors(gpu_session: Session) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    tensors = batch_of(3)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        given = {name: torch.from_numpy(array).cuda() for name, array in tensors.items()}
        found = gpu_session.run_on_device(given, stream=stream)
        boxes = torch.as_tensor(found["boxes"], device="cuda")
        assert boxes.data_ptr() == found["boxes"].pointer
        assert_right(
            {name: torch.as_tensor(value, device="cuda").cpu().numpy() for name, value in found.items()}, tensors
        )
        wanted = {name: torch.empty_like(torch.as_tensor(value, device="cuda")) for name, value in found.items()}
        gpu_session.run_on_device(given, wanted, stream)
        assert_right({name: value.cpu().numpy() for name, value in wanted.items()}, tensors)


@pytest.mark.gpu
def test_cupy_arrays(gpu_session: Session) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    tensors = batch_of(3)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        given = {name: cupy.asarray(array) for name, array in tensors.items()}
        found = gpu_session.run_on_device(given, stream=stream)
        assert cupy.asarray(found["boxes"]).data.ptr == found["boxes"].pointer
        assert_right({name: cupy.asnumpy(cupy.asarray(value)) for name, value in found.items()}, tensors)
        wanted = {name: cupy.empty_like(cupy.asarray(value)) for name, value in found.items()}
        gpu_session.run_on_device(given, wanted, stream)
        assert_right({name: cupy.asnumpy(value) for name, value in wanted.items()}, tensors)


@pytest.mark.gpu
def test_pycuda_arrays(gpu_session: Session) -> None:
    driver = pytest.importorskip("pycuda.driver", reason="pycuda is not installed")
    pytest.importorskip("pycuda.autoprimaryctx", reason="pycuda cannot use the primary context")
    from pycuda.gpuarray import GPUArray, to_gpu_async

    tensors = batch_of(3)
    stream = driver.Stream()
    given = {name: to_gpu_async(array, stream=stream) for name, array in tensors.items()}
    found = gpu_session.run_on_device(given, stream=stream)
    stream.synchronize()
    arrays = {
        name: GPUArray(value.shape, value.dtype, base=value, gpudata=value.pointer) for name, value in found.items()
    }
    assert_right({name: array.get() for name, array in arrays.items()}, tensors)
    wanted = {name: GPUArray(value.shape, value.dtype) for name, value in found.items()}
    gpu_session.run_on_device(given, wanted, stream)
    stream.synchronize()
    assert_right({name: array.get() for name, array in wanted.items()}, tensors)


def test_a_machine_without_a_gpu_says_so() -> None:
    try:
        device = CudaDevice()
    except BackendUnavailableError as error:
        reason = str(error)
    else:
        device.close()
        pytest.skip("there is a GPU")
    assert "NVIDIA" in reason or "cuda-bindings" in reason
    assert "\n" not in reason
