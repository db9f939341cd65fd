"""Running a TensorRT-RTX engine on an RTX GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.engine_backend import TENSORRT_RTX, captured_logger
from runtime.engine_manifest import REBUILD, check_target, read_engine
from runtime.errors import BackendUnavailableError
from runtime.postprocessing import OUTPUT_NAMES
from runtime.session import INPUT_NAMES, Session


class EngineSession(Session):
    """An engine with its buffers, allocated once for the largest batch it takes, and one execution context per profile.

    A batch runs on the profile that was tuned for its size. A context is made when its profile is first used, since
    each holds memory for its intermediate results. Opening checks the file against its manifest before anything else,
    so that a damaged engine is reported as such also on a machine that could not run it. Raises BackendUnavailableError
    without an RTX GPU.
    """

    def __init__(self, path: Path, device_index: int = 0) -> None:
        content, self.manifest = read_engine(path)
        tensorrt_rtx = TENSORRT_RTX.load()
        if self.manifest.version != tensorrt_rtx.__version__:
            raise ValueError(
                f"{path} was built by TensorRT-RTX {self.manifest.version}, this machine has"
                f" {tensorrt_rtx.__version__}; {REBUILD}"
            )
        self._device = _Device(device_index)
        self._contexts: dict[int, Any] = {}
        try:
            check_target(path, self.manifest, self._device.name, self._device.capability)
            self._logger = captured_logger(tensorrt_rtx)
            self._runtime = tensorrt_rtx.Runtime(self._logger)
            self._engine: Any = self._runtime.deserialize_cuda_engine(content)
            if self._engine is None:
                reason = [*self._logger.errors, "no reason was given"][0]
                raise ValueError(f"TensorRT-RTX cannot open {path}: {reason}; {REBUILD}")
            super().__init__(
                name=path.name,
                backend=TENSORRT_RTX.name,
                precision=self.manifest.precision,
                metadata=self.manifest.metadata,
                versions={"tensorrt-rtx": tensorrt_rtx.__version__, "GPU": self._device.name},
                max_batch=self.manifest.largest_batch,
            )
            self._allocate(tensorrt_rtx)
        except BaseException:
            self._device.close()
            raise

    def _allocate(self, tensorrt_rtx: Any) -> None:
        """Device buffers for every input and output at the largest batch; every context uses them."""
        self._types: dict[str, np.dtype] = {}
        self._buffers: dict[str, int] = {}
        last = len(self.manifest.profiles) - 1
        context = self._new_context(last)
        for name in INPUT_NAMES:
            context.set_input_shape(name, self._engine.get_tensor_profile_shape(name, last)[2])
        for name in (*INPUT_NAMES, *OUTPUT_NAMES):
            dtype = np.dtype(tensorrt_rtx.nptype(self._engine.get_tensor_dtype(name)))
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise ValueError(f"{self.manifest.onnx_name}: the shape {shape} of {name} depends on the data")
            self._types[name] = dtype
            self._buffers[name] = self._device.allocate(int(np.prod(shape)) * dtype.itemsize)
            context.set_tensor_address(name, self._buffers[name])
        self._contexts[last] = context

    def _new_context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._device.stream):
            reason = [*self._logger.errors, "no reason was given"][0]
            raise ValueError(f"TensorRT-RTX cannot run {self.name} for batches of this size: {reason}; {REBUILD}")
        self._device.synchronize()
        return context

    def _context_for(self, batch: int) -> Any:
        profile = self.manifest.profile_for(batch)
        if profile not in self._contexts:
            context = self._new_context(profile)
            for name, pointer in self._buffers.items():
                context.set_tensor_address(name, pointer)
            self._contexts[profile] = context
        return self._contexts[profile]

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one batch on the profile for its size; see :meth:`runtime.session.Session.run`."""
        self._device.activate()
        context = self._context_for(len(tensors["images"]))
        # The host arrays must live until the stream is synchronized: the copies are asynchronous.
        inputs = {name: np.ascontiguousarray(tensors[name], self._types[name]) for name in INPUT_NAMES}
        for name, array in inputs.items():
            context.set_input_shape(name, array.shape)
            self._device.copy_in(self._buffers[name], array)
        if not context.execute_async_v3(self._device.stream):
            reason = [*self._logger.errors, "no reason was given"][-1]
            raise RuntimeError(f"TensorRT-RTX could not run {self.name}: {reason}")
        outputs = {name: np.empty(tuple(context.get_tensor_shape(name)), self._types[name]) for name in OUTPUT_NAMES}
        for name, array in outputs.items():
            self._device.copy_out(array, self._buffers[name])
        self._device.synchronize()
        return outputs

    def layer_information(self) -> list[Any]:
        """What TensorRT-RTX says of each layer of the engine: names, or objects with types and tactics."""
        import json

        from tensorrt_rtx_bindings import LayerInformationFormat

        self._device.activate()
        inspector = self._engine.create_engine_inspector()
        layers = json.loads(inspector.get_engine_information(LayerInformationFormat.JSON)).get("Layers", [])
        return list(layers)

    def device_memory(self) -> list[int]:
        """Bytes of intermediate results that a context of each profile holds on the GPU."""
        return [
            int(self._engine.get_device_memory_size_for_profile_v2(number))
            for number in range(len(self.manifest.profiles))
        ]

    def close(self) -> None:
        """Release the model and its memory."""
        self._contexts.clear()
        self._engine = self._runtime = None
        self._device.close()


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
        self.capability = capability = (int(properties.major), int(properties.minor))
        if capability not in TENSORRT_RTX.capabilities:
            known = ", ".join(f"{major}.{minor}" for major, minor in TENSORRT_RTX.capabilities)
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
