"""Latency of several sessions on the same images, measured in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from asag.runtime.backends.pytorch_session import PyTorchSession
from asag.runtime.machine import Machine, describe_machine, processor_load
from asag.runtime.parity.results import Unavailable
from asag.runtime.preprocessing import ImageLike, as_image, prepare
from asag.runtime.session import Session
from asag.runtime.speed.energy import EnergyMeter
from asag.runtime.speed.limits import ModelLimits
from asag.runtime.speed.stage_times import StageTimes, batch_seconds

STAGES = ("prepare", "run", "postprocess")


@dataclasses.dataclass(frozen=True)
class Latency:
    """Milliseconds of one batch, from decoded images to detections, and the median share of each stage.

    ``ratio`` is the median over rounds of this session's time over the first session's in the same round;
    ``ratio_low`` and ``ratio_high`` are its 10th and 90th percentiles (None for the first session).
    ``rounds_ms`` are the times of the rounds, in order. ``device_p50_ms`` is the median time of the network by the
    device's own clock, without copies, in further runs (None on the CPU). Raises ValueError for a ratio without spread.
    """

    name: str
    backend: str
    precision: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_second: float
    stages_p50_ms: dict[str, float]
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    rounds_ms: tuple[float, ...]
    device_p50_ms: float | None = None

    def __post_init__(self) -> None:
        if len({value is None for value in (self.ratio, self.ratio_low, self.ratio_high)}) > 1:
            raise ValueError("a ratio needs both ends of its spread")

    @property
    def differs(self) -> bool:
        """Whether the spread of the ratio leaves out 1: else the difference is noise."""
        if self.ratio_low is None or self.ratio_high is None:
            return False
        return not self.ratio_low <= 1 <= self.ratio_high


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Images per second of a session at one batch size, median and 10th to 90th percentile over rounds.

    ``joules_per_image`` is what the GPU took, None where nothing measures it or no GPU ran. ``reason`` is set, and the
    rest None, where the session does not take the batch.
    """

    name: str
    backend: str
    precision: str
    batch_size: int
    images_per_second: float | None = None
    low: float | None = None
    high: float | None = None
    joules_per_image: float | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class BenchmarkReport:
    """Latencies of the sessions in the order given, with what they were measured on.

    ``unavailable`` names what could not run and why. Where they were asked for, ``throughput`` holds other batch sizes,
    ``peak_memory_mib`` the most memory that a process running only that model used, by the session's place,
    ``stage_times`` the stages of each session, and ``limits`` how far they are from what the machine can do.
    """

    latencies: tuple[Latency, ...]
    batch_size: int
    rounds: int
    warmup: int
    versions: dict[str, str]
    machine: Machine
    unavailable: tuple[Unavailable, ...] = ()
    throughput: tuple[Throughput, ...] = ()
    peak_memory_mib: tuple[float | None, ...] = ()
    stage_times: tuple[StageTimes, ...] = ()
    limits: tuple[ModelLimits, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return dataclasses.asdict(self)


def measure(
    sessions: Sequence[Session],
    images: Sequence[ImageLike],
    *,
    rounds: int = 30,
    warmup: int = 3,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> BenchmarkReport:
    """Run each session once per round on the same batch, in rotating order, after ``warmup`` rounds that do not count.

    Interleaving lets every session meet the same state of the machine. Batches walk through ``images`` and start over;
    decoding is not measured. ``progress`` gets (rounds done, all).
    """
    if not sessions or not images:
        raise ValueError("a benchmark needs at least one model and one image")
    if min(rounds, batch_size) < 1 or warmup < 0:
        raise ValueError(f"rounds and batch size must be at least 1, they are {rounds} and {batch_size}")
    for session in sessions:
        session.check_batch_size(batch_size)
    load = processor_load()
    loaded = [as_image(image) for image in images]
    times = np.zeros((rounds, len(sessions), len(STAGES)))
    for number in range(-warmup, rounds):
        start = (number + warmup) * batch_size
        batch = [loaded[index % len(loaded)] for index in range(start, start + batch_size)]
        for offset in range(len(sessions)):
            index = (number + offset) % len(sessions)
            elapsed = batch_seconds(sessions[index].run, batch, sessions[index].metadata)
            if number >= 0:
                times[number, index] = elapsed
        if progress is not None:
            progress(number + warmup + 1, rounds + warmup)
    return BenchmarkReport(
        latencies=tuple(
            _latency(session, times, index, batch_size, _device_p50_ms(session, batch, rounds))
            for index, session in enumerate(sessions)
        ),
        batch_size=batch_size,
        rounds=rounds,
        warmup=warmup,
        versions={name: text for session in sessions for name, text in session.versions.items()},
        machine=describe_machine(load),
    )


def measure_throughput(
    sessions: Sequence[Session],
    images: Sequence[ImageLike],
    batch_sizes: Sequence[int],
    *,
    rounds: int = 10,
    warmup: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Throughput, ...]:
    """Images per second at each batch size, sessions in turn as in :func:`measure`.

    ``progress`` gets (batch sizes done, all). Energy is read around a session's own rounds after that, since counters
    are slower than a batch.
    """
    found = []
    for done, batch_size in enumerate(batch_sizes, start=1):
        able = [session for session in sessions if session.max_batch is None or batch_size <= session.max_batch]
        report = measure(able, images, rounds=rounds, warmup=warmup, batch_size=batch_size) if able else None
        latencies = iter(report.latencies if report is not None else ())
        for session in sessions:
            named = (session.name, session.backend, session.precision, batch_size)
            if session not in able:
                found.append(Throughput(*named, reason=f"it takes at most {session.max_batch} images at once"))
                continue
            per_second = batch_size * 1e3 / np.array(next(latencies).rounds_ms)
            middle, low, high = (float(value) for value in np.percentile(per_second, [50, 10, 90]))
            joules = _joules_per_image(session, images, batch_size, rounds)
            found.append(Throughput(*named, middle, low, high, joules))
        if progress is not None:
            progress(done, len(batch_sizes))
    return tuple(found)


def _joules_per_image(session: Session, images: Sequence[ImageLike], batch_size: int, rounds: int) -> float | None:
    """What the GPU takes for ``rounds`` batches; None on the CPU, and where no counter is there."""
    if "cuda" not in session.backend and not session.backend.startswith("tensorrt"):
        return None
    meter = EnergyMeter.open()
    if meter is None:
        return None
    batch = [as_image(images[index % len(images)]) for index in range(batch_size)]
    before = meter.joules()
    for _ in range(rounds):
        batch_seconds(session.run, batch, session.metadata)
    return (meter.joules() - before) / (rounds * batch_size)


def _latency(
    session: Session, times: NDArray[np.float64], index: int, batch_size: int, device_p50_ms: float | None
) -> Latency:
    totals = times.sum(axis=2)
    p50, p90, p99 = (float(value) for value in np.percentile(totals[:, index], [50, 90, 99]) * 1e3)
    middle, low, high = ratio_of(totals[:, index], totals[:, 0])
    return Latency(
        name=session.name,
        backend=session.backend,
        precision=session.precision,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        images_per_second=batch_size * 1e3 / p50,
        stages_p50_ms={stage: float(np.median(times[:, index, column]) * 1e3) for column, stage in enumerate(STAGES)},
        ratio=middle if index else None,
        ratio_low=low if index else None,
        ratio_high=high if index else None,
        rounds_ms=tuple((totals[:, index] * 1e3).tolist()),
        device_p50_ms=device_p50_ms,
    )


def _device_p50_ms(session: Session, batch: Sequence[Image.Image], rounds: int) -> float | None:
    """The network's median time between CUDA events, in runs of its own."""
    if not isinstance(session, PyTorchSession):
        return None
    tensors = prepare(batch, session.metadata)
    if session.device_seconds(tensors) is None:
        return None
    return float(np.median([session.device_seconds(tensors) for _ in range(rounds)])) * 1e3


def ratio_of(times: ArrayLike, base: ArrayLike) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile of the quotients of two sessions' times, round by round."""
    middle, low, high = np.percentile(np.asarray(times) / np.asarray(base), [50, 10, 90])
    return float(middle), float(low), float(high)
