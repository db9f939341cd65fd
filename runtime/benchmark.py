"""Latency of several sessions on the same images, measured in turn."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from runtime.machine import Machine, describe_machine
from runtime.postprocessing import postprocess
from runtime.preprocessing import ImageLike, as_image, prepare
from runtime.session import Session

STAGES = ("prepare", "run", "postprocess")


@dataclasses.dataclass(frozen=True)
class Latency:
    """Milliseconds of one batch, from decoded images to detections, and the median share of each stage.

    ``ratio`` is the median over rounds of this session's time over the first session's in the same round;
    ``ratio_low`` and ``ratio_high`` are its 10th and 90th percentiles (None for the first session).
    ``rounds_ms`` are the times of the rounds, in order.
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

    @property
    def differs(self) -> bool:
        """Whether the spread of the ratio leaves out 1: else the difference is noise."""
        if self.ratio_low is None or self.ratio_high is None:
            return False
        return not self.ratio_low <= 1 <= self.ratio_high


@dataclasses.dataclass(frozen=True)
class BenchmarkReport:
    """Latencies of the sessions in the order given, with what they were measured on."""

    latencies: tuple[Latency, ...]
    batch_size: int
    rounds: int
    warmup: int
    versions: dict[str, str]
    machine: Machine

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
        if session.max_batch is not None and batch_size > session.max_batch:
            raise ValueError(f"{session.name} takes at most {session.max_batch} images at once, not {batch_size}")
    loaded = [as_image(image) for image in images]
    times = np.zeros((rounds, len(sessions), len(STAGES)))
    for number in range(-warmup, rounds):
        start = (number + warmup) * batch_size
        batch = [loaded[index % len(loaded)] for index in range(start, start + batch_size)]
        for offset in range(len(sessions)):
            index = (number + offset) % len(sessions)
            elapsed = _stage_seconds(sessions[index], batch)
            if number >= 0:
                times[number, index] = elapsed
        if progress is not None:
            progress(number + warmup + 1, rounds + warmup)
    return BenchmarkReport(
        latencies=tuple(_latency(session, times, index, batch_size) for index, session in enumerate(sessions)),
        batch_size=batch_size,
        rounds=rounds,
        warmup=warmup,
        versions={name: text for session in sessions for name, text in session.versions.items()},
        machine=describe_machine(),
    )


def _stage_seconds(session: Session, batch: Sequence[Image.Image]) -> list[float]:
    marks = [time.perf_counter()]
    tensors = prepare(batch, session.metadata)
    marks.append(time.perf_counter())
    outputs = session.run(tensors)
    marks.append(time.perf_counter())
    postprocess(outputs, [(image.height, image.width) for image in batch], session.metadata)
    marks.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(marks)]


def _latency(session: Session, times: NDArray[np.float64], index: int, batch_size: int) -> Latency:
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
    )


def ratio_of(times: ArrayLike, base: ArrayLike) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile of the quotients of two sessions' times, round by round."""
    middle, low, high = np.percentile(np.asarray(times) / np.asarray(base), [50, 10, 90])
    return float(middle), float(low), float(high)


def benchmark_table(report: BenchmarkReport) -> Group:
    """The report for a terminal of 80 columns; times in milliseconds per batch."""
    names_needed = len({(latency.backend, latency.precision) for latency in report.latencies}) < len(report.latencies)
    table = Table(
        title=f"Latency of a batch of {report.batch_size}, ms, {report.rounds} rounds",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    table.add_column("backend", overflow="fold")
    table.add_column("prec.", no_wrap=True)
    for heading in ("p50", "p90", "p99", "images\n/s", "time / first\n(10..90 %)", "pre-\npare", "run", "post-\nproc."):
        table.add_column(heading, justify="right", no_wrap=True)
    notes = []
    for latency in report.latencies:
        times = (latency.p50_ms, latency.p90_ms, latency.p99_ms)
        table.add_row(
            f"{latency.backend}\n{latency.name}" if names_needed else latency.backend,
            latency.precision,
            *map(milliseconds, times),
            f"{latency.images_per_second:.1f}",
            _ratio_text(latency),
            *(milliseconds(latency.stages_p50_ms[stage]) for stage in STAGES),
        )
        if latency.ratio is not None and not latency.differs:
            notes.append(Text(f"{latency.name} ({latency.backend}): no difference to the first beyond the noise"))
    versions = ", ".join(f"{name} {text}" for name, text in report.versions.items())
    return Group(table, *notes, Text(f"{report.machine.summary()}; {versions}", style="dim"))


def milliseconds(value: float) -> str:
    """A time in milliseconds as text of at most five characters up to 100 seconds."""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _ratio_text(latency: Latency) -> str:
    if latency.ratio is None:
        return "1"
    return f"{latency.ratio:.2f}\n({latency.ratio_low:.2f}..{latency.ratio_high:.2f})"
