"""The CUDA timer's logic on a GPU that is played: a clock, a queue, a cache and graphs, behind PyTorch's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from benchmarks.timing import ClockTimer, CudaTimer, NotCapturableError, capture

FLUSH, WARM, COLD, START = 40.0, 5.0, 9.0, 30.0
"""Microseconds: emptying the caches, the work with warm and with empty caches, and starting a call from Python."""


class PlayedGpu:
    """Time passes in microseconds; work either runs or goes into the graph that is captured."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cache_is_warm = False
        self.captured: list[Callable[[], None]] | None = None
        self.sync_mode = 0
        self.stream: object = "default stream"

    def enqueue(self, work: Callable[[], None]) -> None:
        if self.captured is not None:
            self.captured.append(work)
        else:
            self.now += START
            work()

    def flush(self) -> None:
        def work() -> None:
            self.now, self.cache_is_warm = self.now + FLUSH, False

        self.enqueue(work)

    def run(self) -> None:
        def work() -> None:
            self.now += WARM if self.cache_is_warm else COLD
            self.cache_is_warm = True

        self.enqueue(work)

    def wait(self) -> None:
        if self.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PlayedGpu:
    played = PlayedGpu()

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = played.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return (end.time - self.time) / 1e3

    class Graph:
        work: list[Callable[[], None]]

        def replay(self) -> None:
            for item in self.work:
                item()

    class Stream:
        def wait_stream(self, other: object) -> None:
            assert other == "default stream"

    class Flushed:
        def fill_(self, value: int) -> None:
            played.flush()

        def numel(self) -> int:
            return 1

    @contextmanager
    def graph(target: Graph, stream: object) -> Iterator[None]:
        played.captured, played.stream = [], stream
        yield
        target.work, played.captured, played.stream = played.captured, None, "default stream"

    @contextmanager
    def on_stream(stream: object) -> Iterator[None]:
        played.stream = stream
        yield
        played.stream = "default stream"

    replaced: dict[str, Any] = {
        "Event": Event, "CUDAGraph": Graph, "Stream": Stream, "graph": graph, "stream": on_stream,
        "synchronize": lambda: None, "current_stream": lambda: played.stream, "current_device": lambda: 0,
        "set_stream": lambda stream: setattr(played, "stream", stream),
        "get_sync_debug_mode": lambda: played.sync_mode,
        "set_sync_debug_mode": lambda mode: setattr(played, "sync_mode", mode),
        "get_device_properties": lambda device: type("Properties", (), {"L2_cache_size": 60 << 20}),
    }  # fmt: skip
    for name, value in replaced.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)

    def zeros(size: int, dtype: torch.dtype, device: str) -> Flushed:
        assert (size, dtype, device) == (120 << 20, torch.uint8, "cuda")
        return Flushed()

    monkeypatch.setattr(torch, "zeros", zeros)
    return played


def test_three_ways_to_time(gpu: PlayedGpu) -> None:
    timer = CudaTimer()
    samplers = [timer.from_python(gpu.run), timer.in_graph(gpu.run), timer.cold(gpu.run)]
    for _ in range(2):
        from_python, in_graph, cold = (sample() for sample in samplers)
        # A replay just before leaves the cache warm; only from Python a call may meet an empty one.
        assert START + WARM <= from_python < START + COLD
        assert in_graph == pytest.approx(WARM)
        assert cold == pytest.approx(COLD)


def test_work_that_python_waits_for_is_not_captured(gpu: PlayedGpu) -> None:
    captures = []

    def waiting() -> None:
        captures.append(gpu.captured)
        gpu.wait()

    with pytest.raises(NotCapturableError, match="Python waits for a result: called a synchronizing"):
        capture(waiting)
    assert captures == [None, None]
    assert gpu.sync_mode == 0


def test_a_capture_that_fails_leaves_the_stream_as_it_was(gpu: PlayedGpu) -> None:
    def refused() -> None:
        if gpu.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    with pytest.raises(NotCapturableError, match=r"^operation not permitted when stream is capturing$"):
        capture(refused)
    assert gpu.stream == "default stream"


def test_the_clock_has_no_graphs() -> None:
    ran = []
    assert ClockTimer().from_python(lambda: ran.append(1))() >= 0
    assert ran
    for start in (ClockTimer().in_graph, ClockTimer().cold):
        with pytest.raises(NotCapturableError, match="need a GPU"):
            start(lambda: None)
