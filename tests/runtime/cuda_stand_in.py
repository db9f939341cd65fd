# ruff: noqa: N802, N815 (CUDA's names)
"""A stand-in for ``cuda.bindings.runtime`` on host memory, as late as the real one may be.

Work on a stream is kept until somebody waits for it, so that a result that is read too early, or an input that is
overwritten too early, gives wrong numbers here. Copies between pageable memory, outside an allocation or after its end
fail the test, and so does waiting or allocating while the same thread captures a graph.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorInvalidDevice = 101
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureInvalidated = 901


class CopyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class CaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


Operation = Callable[[], None]
ALLOCATIONS = ("cudaMalloc", "cudaHostAlloc")
SYNCHRONIZATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


class StandInCuda:
    """Handles and addresses are numbers; ``calls`` counts the functions, ``trace`` names them in order.

    ``launch_error`` is returned by the next wait, as an error of a kernel would be; ``allocations_left`` bounds how
    many allocations succeed.
    """

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = Error, CopyKind, CaptureMode
    cudaStreamNonBlocking, cudaEventDisableTiming, cudaHostAllocDefault = 1, 2, 0

    def __init__(self, capability: tuple[int, int] = (8, 6)) -> None:
        self.capability = capability
        self.calls: Counter[str] = Counter()
        self.trace: list[str] = []
        self.launch_error: Error | None = None
        self.allocations_left = 10**9
        self._lock = threading.RLock()
        self._handles = itertools.count(1000)
        self._device: dict[int, NDArray] = {}
        self._pinned: dict[int, NDArray] = {}
        self._streams: dict[int, deque[Operation]] = {0: deque(), 1: deque()}
        self._records: dict[int, tuple[int, int]] = {}  # event: the stream it was recorded on last, how often recorded
        self._passed: dict[int, int] = {}
        self._capturing: dict[int, tuple[int, list[Operation] | None]] = {}  # stream: thread, None once invalid
        self._graphs: dict[int, list[Operation]] = {}
        self._executables: dict[int, list[Operation]] = {}

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(value) or isinstance(value, type):
            return value

        def counted(*arguments: Any) -> Any:
            with self._lock:
                self.calls[name] += 1
                self.trace.append(name)
                return value(*arguments)

        return counted

    def outstanding(self) -> dict[str, int]:
        """What was made and not freed, without the default streams."""
        made = {"device": self._device, "pinned": self._pinned, "events": self._records, "graphs": self._graphs}
        made["executables"] = self._executables
        counts = {name: len(things) for name, things in made.items()} | {"streams": len(self._streams) - 2}
        return {name: count for name, count in counts.items() if count}

    def enqueue(self, stream: int, operation: Operation) -> None:
        """What a kernel launch does."""
        with self._lock:
            if stream in self._capturing:
                recorded = self._capturing[stream][1]
                if recorded is not None:
                    recorded.append(operation)
            else:
                self._streams[stream].append(operation)

    def is_capturing(self, stream: int) -> bool:
        return stream in self._capturing

    def view(self, address: int, shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
        """An array on the device, which must be inside one allocation."""
        memory = self._inside(self._device, address, int(np.prod(shape)) * dtype.itemsize)
        return memory.view(dtype).reshape(shape)

    def to_device(self, array: NDArray) -> int:
        """The address of a copy on the device, for tests."""
        _, address = self.cudaMalloc(array.nbytes)
        self.view(address, array.shape, array.dtype)[...] = array
        return int(address)

    def cudaGetDeviceCount(self) -> tuple[Error, int]:
        return Error.cudaSuccess, 1

    def cudaGetDeviceProperties(self, index: int) -> tuple[Error, Any]:
        major, minor = self.capability
        return Error.cudaSuccess, SimpleNamespace(name=b"Stand-in GPU\0\0", major=major, minor=minor)

    def cudaSetDevice(self, index: int) -> tuple[Error]:
        return (Error.cudaSuccess if index == 0 else Error.cudaErrorInvalidDevice,)

    def cudaGetLastError(self) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Error, int | None]:
        return self._allocate(self._device, size)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Error, int | None]:
        return self._allocate(self._pinned, size)

    def cudaFree(self, address: int) -> tuple[Error]:
        for stream in self._streams:
            self._drain(stream)
        del self._device[address]
        return (Error.cudaSuccess,)

    def cudaFreeHost(self, address: int) -> tuple[Error]:
        del self._pinned[address]
        return (Error.cudaSuccess,)

    def _allocate(self, memory: dict[int, NDArray], size: int) -> tuple[Error, int | None]:
        assert size > 0
        if self._break_capture() or self.allocations_left == 0:
            return Error.cudaErrorMemoryAllocation, None
        self.allocations_left -= 1
        array = np.full(size, 0xA5, np.uint8)
        memory[array.ctypes.data] = array
        return Error.cudaSuccess, array.ctypes.data

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: CopyKind, stream: int) -> tuple[Error]:
        kinds = (
            (self._device, self._pinned) if kind == CopyKind.cudaMemcpyHostToDevice else (self._pinned, self._device)
        )

        def copy() -> None:
            self._inside(kinds[0], to, size)
            self._inside(kinds[1], source, size)
            ctypes.memmove(to, source, size)

        self._inside(kinds[0], to, size)
        self._inside(kinds[1], source, size)
        self.enqueue(stream, copy)
        return (Error.cudaSuccess,)

    @staticmethod
    def _inside(memory: dict[int, NDArray], address: int, size: int) -> NDArray:
        for start, array in memory.items():
            if start <= address and address + size <= start + array.nbytes:
                return array[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address} are not inside an allocation of the right kind")

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Error, int]:
        handle = next(self._handles)
        self._streams[handle] = deque()
        return Error.cudaSuccess, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[Error]:
        assert not self._streams.pop(stream), "a stream was destroyed with work on it"
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        if self._break_capture():
            return (Error.cudaErrorStreamCaptureInvalidated,)
        self._drain(stream)
        return (Error.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Error, int]:
        handle = next(self._handles)
        self._records[handle], self._passed[handle] = (0, 0), 0
        return Error.cudaSuccess, handle

    def cudaEventDestroy(self, event: int) -> tuple[Error]:
        del self._records[event]
        return (Error.cudaSuccess,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Error]:
        version = self._records[event][1] + 1
        self._records[event] = (stream, version)
        self.enqueue(stream, lambda: self._passed.update({event: version}))
        return (Error.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Error]:
        other, version = self._records[event]
        self.enqueue(stream, lambda: self._advance(other, event, version))
        return (Error.cudaSuccess,)

    def cudaEventSynchronize(self, event: int) -> tuple[Error]:
        if self._break_capture():
            return (Error.cudaErrorStreamCaptureInvalidated,)
        self._advance(self._records[event][0], event, self._records[event][1])
        error, self.launch_error = self.launch_error, None
        return (Error.cudaSuccess if error is None else error,)

    def _advance(self, stream: int, event: int, version: int) -> None:
        while self._passed[event] < version:
            self._streams[stream].popleft()()

    def _drain(self, stream: int) -> None:
        while self._streams[stream]:
            self._streams[stream].popleft()()

    def _break_capture(self) -> bool:
        """Spoil what the calling thread captures; whether it captures."""
        mine = [stream for stream, (thread, _) in self._capturing.items() if thread == threading.get_ident()]
        for stream in mine:
            self._capturing[stream] = (threading.get_ident(), None)
        return bool(mine)

    def cudaStreamBeginCapture(self, stream: int, mode: CaptureMode) -> tuple[Error]:
        assert mode == CaptureMode.cudaStreamCaptureModeThreadLocal
        self._capturing[stream] = (threading.get_ident(), [])
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, int | None]:
        _, operations = self._capturing.pop(stream)
        if operations is None:
            return Error.cudaErrorStreamCaptureInvalidated, None
        handle = next(self._handles)
        self._graphs[handle] = operations
        return Error.cudaSuccess, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Error, int]:
        handle = next(self._handles)
        self._executables[handle] = list(self._graphs[graph])
        return Error.cudaSuccess, handle

    def cudaGraphDestroy(self, graph: int) -> tuple[Error]:
        del self._graphs[graph]
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[Error]:
        for operation in self._executables[executable]:
            self.enqueue(stream, operation)
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[Error]:
        del self._executables[executable]
        return (Error.cudaSuccess,)


def install(monkeypatch: pytest.MonkeyPatch, cuda: StandInCuda) -> None:
    """Let `import cuda.bindings.runtime` give the stand-in, whether or not the package is installed."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)  # type: ignore[misc]  # it is no module
