"""A GPU's memory, streams, events and graphs through cuda-bindings, and arrays that lie on a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag.runtime.errors import BackendUnavailableError

DEFAULT_STREAM = 1
"""How `__cuda_array_interface__` writes the default stream, whose handle is 0."""


class CudaDevice:
    """One GPU. Streams, events, graphs and memory are plain numbers (handles and addresses), freed by :meth:`close`.

    Calls may come from any thread; :meth:`activate` comes first on each. Raises BackendUnavailableError where there is
    no such GPU, and RuntimeError from any method when CUDA refuses. ``name`` and ``capability`` describe the GPU.
    """

    def __init__(self, index: int = 0) -> None:
        try:
            self._runtime: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError:
            raise BackendUnavailableError("using a GPU needs cuda-bindings: pip install cuda-bindings") from None
        self._index = index
        self._resources = ExitStack()
        try:
            status, count = self._runtime.cudaGetDeviceCount()
        except RuntimeError as error:  # the library behind the bindings is not there
            raise BackendUnavailableError(f"no NVIDIA driver on this machine ({error})") from None
        if status == self._runtime.cudaError_t.cudaErrorInsufficientDriver:  # which no driver at all is, too
            raise BackendUnavailableError(
                "no usable GPU: no NVIDIA driver on this machine, or one too old for this CUDA"
            )
        if status != self._runtime.cudaError_t.cudaSuccess:
            raise BackendUnavailableError(f"no NVIDIA GPU that CUDA can use on this machine ({status.name})")
        if index >= count:
            raise BackendUnavailableError(f"there is no GPU {index}; this machine has {count}")
        properties = self._call("cudaGetDeviceProperties", index)
        self.name = bytes(properties.name).split(b"\0")[0].decode()
        self.capability = (int(properties.major), int(properties.minor))
        self.activate()

    def _call(self, function: str, *arguments: Any) -> Any:
        """The value that a function of the CUDA runtime returns beside its status."""
        status, *values = getattr(self._runtime, function)(*arguments)
        if status != self._runtime.cudaError_t.cudaSuccess:
            raise RuntimeError(f"CUDA call {function} failed: {status.name}")
        return values[0] if values else None

    def activate(self) -> None:
        """Make this the calling thread's device."""
        self._call("cudaSetDevice", self._index)

    def create_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        stream = int(self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking))
        self._resources.callback(self._runtime.cudaStreamDestroy, stream)
        return stream

    def create_event(self) -> int:
        """An event that keeps no time."""
        event = int(self._call("cudaEventCreateWithFlags", self._runtime.cudaEventDisableTiming))
        self._resources.callback(self._runtime.cudaEventDestroy, event)
        return event

    def allocate(self, size: int) -> int:
        """Memory on the GPU of ``size`` bytes."""
        address = int(self._call("cudaMalloc", size))
        self._resources.callback(self._runtime.cudaFree, address)
        return address

    def allocate_pinned(self, shape: Sequence[int], dtype: np.dtype) -> NDArray:
        """A host array that copies to and from the GPU run beside other work; gone after :meth:`close`."""
        count = int(np.prod(shape))
        address = int(self._call("cudaHostAlloc", count * dtype.itemsize, self._runtime.cudaHostAllocDefault))
        self._resources.callback(self._runtime.cudaFreeHost, address)
        memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
        return np.frombuffer(memoryview(memory), dtype, count).reshape(shape)

    def allocate_array(self, shape: Sequence[int], dtype: np.dtype, stream: int | None = None) -> DeviceArray:
        """An array that lives as long as Python refers to it, beyond :meth:`close`. Freeing waits for the GPU."""
        size = int(np.prod(shape)) * dtype.itemsize
        array = DeviceArray(int(self._call("cudaMalloc", size)), tuple(shape), dtype, stream)
        weakref.finalize(array, self._runtime.cudaFree, array.pointer)
        return array

    def copy_to_device(self, address: int, array: NDArray, stream: int) -> None:
        """Put the copy of a contiguous pinned array on a stream."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def copy_to_host(self, array: NDArray, address: int, stream: int) -> None:
        """Put the copy into a contiguous pinned array on a stream."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def record(self, event: int, stream: int) -> None:
        """Make the event happen when the stream has done all that is on it."""
        self._call("cudaEventRecord", event, stream)

    def wait_on_stream(self, stream: int, event: int) -> None:
        """Hold what follows on the stream until the event; the caller goes on."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def wait(self, event: int) -> None:
        """Hold the caller until the event. Raises RuntimeError also for what failed on the GPU before it."""
        self._call("cudaEventSynchronize", event)

    def synchronize(self, stream: int) -> None:
        """Hold the caller until the stream has done all that is on it."""
        self._call("cudaStreamSynchronize", stream)

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """An executable graph of what ``enqueue`` puts on the stream, which is recorded and not run.

        Raises RuntimeError where it cannot be captured; the stream then is as it was.
        """
        # Other threads may allocate and wait meanwhile; only this one is held to the rules of capturing.
        self._call(
            "cudaStreamBeginCapture", stream, self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        try:
            enqueue()
        except RuntimeError:
            self._drop_capture(stream)
            raise
        try:
            graph = self._call("cudaStreamEndCapture", stream)
            try:
                executable = int(self._call("cudaGraphInstantiate", graph, 0))
            finally:
                self._call("cudaGraphDestroy", graph)
        except RuntimeError:
            self._runtime.cudaGetLastError()  # else the next check of any library reports this failure
            raise
        self._resources.callback(self._runtime.cudaGraphExecDestroy, executable)
        return executable

    def _drop_capture(self, stream: int) -> None:
        status, graph = self._runtime.cudaStreamEndCapture(stream)
        if status == self._runtime.cudaError_t.cudaSuccess and graph is not None:
            self._runtime.cudaGraphDestroy(graph)
        self._runtime.cudaGetLastError()

    def launch(self, graph: int, stream: int) -> None:
        """Put a graph on a stream."""
        self._call("cudaGraphLaunch", graph, stream)

    def close(self) -> None:
        """Free everything, the last made first; nothing may be running any more."""
        self._runtime.cudaSetDevice(self._index)
        self._resources.close()


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceArray:
    """A row-major array on a GPU: address, shape, element type.

    Anything that reads ``__cuda_array_interface__`` (version 3) can use it without a copy: ``torch.as_tensor``,
    ``cupy.asarray``; pycuda takes ``pointer`` as ``gpudata``. ``stream``: the stream that writes it, as the interface
    counts them (1 is the default stream); None when it is ready. ``owner`` is kept alive with it.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    stream: int | None = None
    owner: Any = None

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
            "strides": None,
            "stream": self.stream,
        }

    @classmethod
    def of(cls, name: str, array: Any) -> DeviceArray:
        """The array behind any object with ``__cuda_array_interface__``, which it keeps alive.

        Raises ValueError, naming the array, where there is no such interface or the memory is not row-major.
        """
        described = getattr(array, "__cuda_array_interface__", None)
        if described is None:
            raise ValueError(f"{name} is no array on a GPU: {type(array).__name__} has no __cuda_array_interface__")
        shape, dtype = tuple(described["shape"]), np.dtype(described["typestr"])
        strides = described.get("strides")
        if strides is not None and not _is_row_major(shape, tuple(strides), dtype.itemsize):
            raise ValueError(f"{name} must be row-major (contiguous); its strides are {tuple(strides)} bytes")
        return cls(int(described["data"][0]), shape, dtype, described.get("stream"), array)


def check_array(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise ValueError, naming the array, unless it has this shape and element type."""
    if tuple(array.shape) != shape or array.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {list(shape)}, it is {array.dtype} {list(array.shape)}")


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...], item_size: int) -> bool:
    """Whether the last axis moves fastest and there are no gaps; strides in bytes."""
    step = item_size
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != step:
            return False
        step *= length
    return True


def stream_handle(stream: Any) -> int:
    """The number of a CUDA stream: of an int itself, or of a stream of pycuda, CuPy, PyTorch or cuda.core.

    Raises ValueError for anything else.
    """
    if isinstance(stream, int):
        return stream
    for attribute in ("handle", "ptr", "cuda_stream"):  # pycuda and cuda.core, CuPy, PyTorch
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    raise ValueError(f"{type(stream).__name__} is no CUDA stream; give its handle as an int")
