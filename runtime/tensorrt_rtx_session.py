"""Running a TensorRT-RTX engine on an RTX GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendUnavailableError
from runtime.postprocessing import OUTPUT_NAMES
from runtime.session import INPUT_NAMES, Session
from runtime.tensorrt_rtx import (
    BACKEND,
    RTX_COMPUTE_CAPABILITIES,
    EngineManifest,
    captured_logger,
    import_tensorrt_rtx,
    read_manifest,
)


class TensorRTRTXSession(Session):
    """An engine with its buffers, allocated once for the largest batch of its profile.

    Opening checks the file against its manifest before anything else, so that a damaged engine is reported as such
    also on a machine that could not run it. Raises BackendUnavailableError without an RTX GPU.
    """

    def __init__(self, path: Path, device_index: int = 0) -> None:
        content = path.read_bytes()
        manifest = read_manifest(path)
        _check_engine(path, content, manifest)
        tensorrt_rtx = import_tensorrt_rtx()
        if manifest.version != tensorrt_rtx.__version__:
            raise ValueError(
                f"{path} was built by TensorRT-RTX {manifest.version}, this machine has {tensorrt_rtx.__version__};"
                " build the engine again with `asag build`"
            )
        self._device = _Device(device_index)
        try:
            self._logger = captured_logger(tensorrt_rtx)
            self._runtime = tensorrt_rtx.Runtime(self._logger)
            self._engine: Any = self._runtime.deserialize_cuda_engine(content)
            self._context: Any = self._engine.create_execution_context() if self._engine is not None else None
            if self._context is None:
                reason = [*self._logger.errors, "no reason was given"][0]
                raise ValueError(f"TensorRT-RTX cannot open {path}: {reason}; build it again with `asag build`")
            self._allocate(tensorrt_rtx, manifest)
        except BaseException:
            self._device.close()
            raise
        super().__init__(
            name=path.name,
            backend=BACKEND,
            precision=manifest.precision,
            metadata=manifest.metadata,
            versions={"tensorrt-rtx": tensorrt_rtx.__version__, "GPU": self._device.name},
            max_batch=manifest.profile[2],
        )
        self._smallest_batch = manifest.profile[0]

    def _allocate(self, tensorrt_rtx: Any, manifest: EngineManifest) -> None:
        """Device buffers for every input and output at the profile's largest batch."""
        self._types: dict[str, np.dtype] = {}
        self._buffers: dict[str, int] = {}
        largest = {name: self._engine.get_tensor_profile_shape(name, 0)[2] for name in INPUT_NAMES}
        for name, shape in largest.items():
            self._context.set_input_shape(name, shape)
        for name in (*INPUT_NAMES, *OUTPUT_NAMES):
            dtype = np.dtype(tensorrt_rtx.nptype(self._engine.get_tensor_dtype(name)))
            shape = tuple(self._context.get_tensor_shape(name))
            if min(shape) < 0:
                raise ValueError(f"{manifest.onnx_name}: the shape {shape} of {name} depends on the data")
            self._types[name] = dtype
            self._buffers[name] = self._device.allocate(int(np.prod(shape)) * dtype.itemsize)
            self._context.set_tensor_address(name, self._buffers[name])

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one batch; see :meth:`runtime.session.Session.run`."""
        batch = len(tensors["images"])
        if batch < self._smallest_batch or (self.max_batch is not None and batch > self.max_batch):
            raise ValueError(f"{self.name} takes {self._smallest_batch} to {self.max_batch} images, not {batch}")
        self._device.activate()
        # The host arrays must live until the stream is synchronized: the copies are asynchronous.
        inputs = {name: np.ascontiguousarray(tensors[name], self._types[name]) for name in INPUT_NAMES}
        for name, array in inputs.items():
            self._context.set_input_shape(name, array.shape)
            self._device.copy_in(self._buffers[name], array)
        if not self._context.execute_async_v3(self._device.stream):
            reason = [*self._logger.errors, "no reason was given"][-1]
            raise RuntimeError(f"TensorRT-RTX could not run {self.name}: {reason}")
        outputs = {
            name: np.empty(tuple(self._context.get_tensor_shape(name)), self._types[name]) for name in OUTPUT_NAMES
        }
        for name, array in outputs.items():
            self._device.copy_out(array, self._buffers[name])
        self._device.synchronize()
        return outputs

    def close(self) -> None:
        """Release the model and its memory."""
        self._context = self._engine = self._runtime = None
        self._device.close()


def _check_engine(path: Path, content: bytes, manifest: EngineManifest) -> None:
    remedy = "build the engine again with `asag build`"
    if manifest.backend != BACKEND:
        raise ValueError(f"{path} is an engine of {manifest.backend}, which this version cannot run; {remedy}")
    if hashlib.sha256(content).hexdigest() != manifest.engine_sha256:
        raise ValueError(f"{path} is damaged or is not the engine that its manifest describes; {remedy}")


class _Device:
    """A CUDA device with one stream and the memory allocated on it, through cuda-bindings."""

    def __init__(self, index: int) -> None:
        try:
            from cuda.bindings import driver, runtime
        except ImportError:
            raise BackendUnavailableError("running an engine needs cuda-bindings: pip install cuda-bindings") from None
        self._runtime = runtime
        self._index = index
        self._allocations: list[int] = []
        try:
            (status,) = driver.cuInit(0)
        except RuntimeError:  # cuda-bindings could not load the driver's library at all
            raise BackendUnavailableError("no NVIDIA driver on this machine; an engine runs on an RTX GPU") from None
        if status != driver.CUresult.CUDA_SUCCESS:
            raise BackendUnavailableError(f"no usable NVIDIA GPU ({status.name}); an engine needs an RTX GPU")
        count = self._check(runtime.cudaGetDeviceCount())
        if index >= count:
            raise BackendUnavailableError(f"there is no GPU {index}; this machine has {count}")
        properties = self._check(runtime.cudaGetDeviceProperties(index))
        self.name = bytes(properties.name).split(b"\0")[0].decode()
        capability = (properties.major, properties.minor)
        if capability not in RTX_COMPUTE_CAPABILITIES:
            known = ", ".join(f"{major}.{minor}" for major, minor in RTX_COMPUTE_CAPABILITIES)
            raise BackendUnavailableError(
                f"TensorRT-RTX engines do not run on {self.name} (compute capability {capability[0]}.{capability[1]});"
                f" they run on {known}"
            )
        self.activate()
        self.stream = int(self._check(runtime.cudaStreamCreate()))

    def _check(self, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != self._runtime.cudaError_t.cudaSuccess:
            raise RuntimeError(f"CUDA call failed: {status.name}")
        return values[0] if values else None

    def activate(self) -> None:
        """Make this the calling thread's device."""
        self._check(self._runtime.cudaSetDevice(self._index))

    def allocate(self, size: int) -> int:
        """Device memory of ``size`` bytes, freed by :meth:`close`."""
        pointer = int(self._check(self._runtime.cudaMalloc(size)))
        self._allocations.append(pointer)
        return pointer

    def copy_in(self, pointer: int, array: NDArray) -> None:
        """Copy a contiguous host array to the device on the stream."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._check(self._runtime.cudaMemcpyAsync(pointer, array.ctypes.data, array.nbytes, kind, self.stream))

    def copy_out(self, array: NDArray, pointer: int) -> None:
        """Copy from the device into a contiguous host array on the stream."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._check(self._runtime.cudaMemcpyAsync(array.ctypes.data, pointer, array.nbytes, kind, self.stream))

    def synchronize(self) -> None:
        """Wait until the stream has finished."""
        self._check(self._runtime.cudaStreamSynchronize(self.stream))

    def close(self) -> None:
        """Free the memory and the stream."""
        for pointer in self._allocations:
            self._runtime.cudaFree(pointer)
        self._allocations.clear()
        if getattr(self, "stream", None) is not None:
            self._runtime.cudaStreamDestroy(self.stream)
            del self.stream
