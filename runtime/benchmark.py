"""Latency of several sessions on the same images, measured in turn."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
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
    ratios = totals[:, index] / totals[:, 0]
    low, middle, high = (float(value) for value in np.percentile(ratios, [10, 50, 90]))
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
    )


def benchmark_table(report: BenchmarkReport) -> Group:
    """The report for the terminal."""
    table = Table(title=f"Latency, batch {report.batch_size}, {report.rounds} rounds")
    for heading in ("model", "backend", "precision"):
        table.add_column(heading, overflow="fold")
    for heading in ("p50 ms", "p90 ms", "p99 ms", "images/s", "time / first", *STAGES):
        table.add_column(heading, justify="right")
    for latency in report.latencies:
        table.add_row(
            latency.name,
            latency.backend,
            latency.precision,
            *(f"{value:.1f}" for value in (latency.p50_ms, latency.p90_ms, latency.p99_ms)),
            f"{latency.images_per_second:.1f}",
            _ratio_text(latency),
            *(f"{latency.stages_p50_ms[stage]:.1f}" for stage in STAGES),
        )
    versions = ", ".join(f"{name} {text}" for name, text in report.versions.items())
    return Group(table, Text(f"{report.machine.summary()}; {versions}", style="dim"))


def _ratio_text(latency: Latency) -> str:
    if latency.ratio is None:
        return "1"
    spread = f"{latency.ratio:.2f} ({latency.ratio_low:.2f}..{latency.ratio_high:.2f})"
    return spread if latency.differs else f"{spread}, no difference"
