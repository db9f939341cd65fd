"""How to time: contenders in turn, round after round, by a clock or on a GPU.

A sampler measures once and gives microseconds per call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

Sampler = Callable[[], float]
"""Measures once: microseconds per call."""

WARM_UP = 3
"""Rounds that do not count."""
MOST_CALLS = 50
"""Calls per sample, so that starting the first and noticing the last one's end weigh little."""
SAMPLE_MICROSECONDS = 500.0
"""What a sample lasts where that takes no more than `MOST_CALLS` calls."""

Key = TypeVar("Key", bound=Hashable)


class NotCapturableError(RuntimeError):
    """A CUDA graph cannot hold the work; the text says why."""


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of what the rounds gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Any) -> Spread:
        """Of a sequence of numbers."""
        low, median, high = np.percentile(np.asarray(values, dtype=float), (10, 50, 90))
        return cls(float(median), float(low), float(high))


def interleave(samplers: Mapping[Key, Sampler], rounds: int) -> dict[Key, list[float]]:
    """Every sampler once per round, in an order that rotates, so that all meet the same states of the machine."""
    times: dict[Key, list[float]] = {key: [] for key in samplers}
    order = list(samplers)
    for number in range(-WARM_UP, rounds):
        for offset in range(len(order)):
            key = order[(number + offset) % len(order)]
            value = samplers[key]()
            if number >= 0:
                times[key].append(value)
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> Spread:
    """Spread of the quotients, round by round."""
    return Spread.of(np.asarray(times) / np.asarray(base))


class ClockTimer:
    """Three ways to time work, here by this machine's clock, for work that has ended when its function returns.

    Each takes a function that starts the work, calls it to warm up, and gives a sampler.
    """

    def from_python(self, run: Callable[[], Any]) -> Sampler:
        """Calls one after another, each started from Python."""
        run()
        calls = _calls(_clock_sampler(run, 1)())
        return _clock_sampler(run, calls)

    def in_graph(self, run: Callable[[], Any]) -> Sampler:
        """Calls one after another in a CUDA graph. Raises NotCapturableError where no graph can hold the work."""
        raise NotCapturableError("CUDA graphs need a GPU")

    def cold(self, run: Callable[[], Any]) -> Sampler:
        """Calls that find none of their inputs in the GPU's caches. Raises NotCapturableError as `in_graph` does."""
        raise NotCapturableError("CUDA graphs need a GPU")


class CudaTimer(ClockTimer):
    """The same by the current GPU's clock, between events."""

    def __init__(self) -> None:
        import torch

        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flushed = torch.zeros(max(2 * size, 1 << 26), dtype=torch.uint8, device="cuda")

    def from_python(self, run: Callable[[], Any]) -> Sampler:
        """From an idle GPU on, so that a slow start from Python counts, as it does in a detector run eagerly."""
        return self._started(run, self._calls(run))

    def in_graph(self, run: Callable[[], Any]) -> Sampler:
        """Without starting from Python; inputs and outputs stay in the caches as far as they fit."""
        calls = self._calls(run)
        return self._replayed(self._captured(run, calls), calls)

    def cold(self, run: Callable[[], Any]) -> Sampler:
        """A graph of pairs, emptying the caches and the work, less a graph that only empties them, in the same round.

        The difference rather than events around the work, since an event takes about as long as a short kernel, and
        they would charge the work for writing back what emptying left in the cache, but not for what it leaves there.
        """
        calls = self._calls(run)

        def pair() -> None:
            self._flush()
            run()

        pairs = self._replayed(self._captured(pair, calls), calls)
        flushes = self._replayed(self._captured(self._flush, calls), calls)
        return lambda: pairs() - flushes()

    def _flush(self) -> None:
        self._flushed.fill_(1)

    def _calls(self, run: Callable[[], Any]) -> int:
        run()  # compiles and loads
        return _calls(self._started(run, 3)())

    def _started(self, run: Callable[[], Any], calls: int) -> Sampler:
        import torch

        def sample() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / calls * 1e3

        return sample

    def _replayed(self, replay: Callable[[], Any], calls: int) -> Sampler:
        import torch

        def sample() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The first replay keeps the GPU busy while Python hands over the second: only that one is measured.
            replay()
            start.record()
            replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / calls * 1e3

        return sample

    def _captured(self, run: Callable[[], Any], calls: int) -> Callable[[], Any]:
        def work() -> None:
            for _ in range(calls):
                run()

        return capture(work)


def capture(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as one CUDA graph; returns its replay. Raises NotCapturableError where a graph cannot hold it."""
    import torch

    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    # A capture that fails leaves some versions of PyTorch with a broken allocator, so the cause, Python waiting for a
    # result, is looked for first.
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        raise NotCapturableError(f"Python waits for a result: {first_line(error)}") from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    except RuntimeError as error:
        torch.cuda.set_stream(before)
        raise NotCapturableError(first_line(error)) from error
    return partial(_replay, graph, run)


def _replay(graph: Any, work: Callable[[], Any]) -> None:
    """`work` is only held on to: it owns the tensors whose addresses are in the graph."""
    graph.replay()


def first_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _clock_sampler(run: Callable[[], Any], calls: int) -> Sampler:
    def sample() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls * 1e6

    return sample


def _calls(microseconds: float) -> int:
    """How many calls of this length make a sample."""
    return max(1, min(MOST_CALLS, int(SAMPLE_MICROSECONDS / max(microseconds, 1e-3))))
