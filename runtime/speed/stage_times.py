"""How long each stage takes, from decoded pixels to detections: the table behind `asag bench --stages`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from asag.runtime.backends.onnxruntime_session import OnnxRuntimeSession
from asag.runtime.backends.pytorch_session import PyTorchSession
from asag.runtime.errors import BackendUnavailableError
from asag.runtime.metadata import ModelMetadata
from asag.runtime.postprocessing import postprocess
from asag.runtime.preprocessing import ImageLike, as_image, prepare
from asag.runtime.session import Session
from asag.runtime.speed.onnx_profile import OTHER, OnnxStageProfile
from asag.runtime.stages.graph import network_parts

BEFORE, AFTER = ("pre-processing", "copies"), (OTHER, "post-processing")
"""What is timed around the parts of the network, in order. ``copies`` go to a device and back, ``other`` is what cannot
be told apart."""


@dataclasses.dataclass(frozen=True)
class StageTimes:
    """Median milliseconds of the parts of one batch, in order; a part that a backend does not have is missing.

    ``reason`` is set and ``p50_ms`` empty where the backend does not tell its stages apart.
    """

    name: str
    backend: str
    precision: str
    p50_ms: dict[str, float]
    reason: str | None = None

    @property
    def total_ms(self) -> float:
        """All stages together."""
        return sum(self.p50_ms.values())

    def share(self, *stages: str) -> float:
        """What part of the total these stages take, 0 to 1."""
        return sum(self.p50_ms.get(stage, 0.0) for stage in stages) / self.total_ms if self.p50_ms else 0.0


class _Clock(Protocol):
    """Runs batches and knows afterwards what each of them spent in every stage of the network, in seconds."""

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one batch; see :meth:`runtime.session.Session.run`."""

    def finish(self) -> list[dict[str, float]]:
        """The stages of every run, in order."""


class _PyTorchClock:
    def __init__(self, session: PyTorchSession) -> None:
        self._session = session
        self._found: list[dict[str, float]] = []

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        outputs, seconds = self._session.timed_run(tensors)
        self._found.append(seconds)
        return outputs

    def finish(self) -> list[dict[str, float]]:
        return self._found


class _OnnxClock:
    """Shares come from a run under the profiler, the time that they divide from the session's own run beside it."""

    def __init__(self, session: OnnxRuntimeSession, threads: int | None) -> None:
        self._session = session
        self._profile = OnnxStageProfile(session.path, threads)
        self._seconds: list[float] = []

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        self._profile.run(tensors)
        start = time.perf_counter()
        outputs = self._session.run(tensors)
        self._seconds.append(time.perf_counter() - start)
        return outputs

    def finish(self) -> list[dict[str, float]]:
        runs = zip(self._seconds, self._profile.finish(), strict=True)
        return [{stage: share * seconds for stage, share in shares.items()} for seconds, shares in runs]


def measure_stages(
    sessions: Sequence[Session],
    images: Sequence[ImageLike],
    *,
    rounds: int = 10,
    warmup: int = 2,
    batch_size: int = 1,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[StageTimes, ...]:
    """The stages of each session, in turn in every round as :func:`runtime.speed.benchmark.measure` does.

    ``threads`` is what the sessions were opened with; ``progress`` gets (rounds done, all). A session that does not
    tell its stages apart is named with the reason.
    """
    clocks: list[_Clock | str] = [_clock(session, threads) for session in sessions]
    loaded = [as_image(image) for image in images]
    outside: list[list[list[float]]] = [[] for _ in sessions]
    for number in range(rounds + warmup):
        batch = [loaded[(number * batch_size + place) % len(loaded)] for place in range(batch_size)]
        for offset in range(len(sessions)):
            index = (number + offset) % len(sessions)
            clock, metadata = clocks[index], sessions[index].metadata
            if isinstance(clock, str):
                continue
            outside[index].append(batch_seconds(clock.run, batch, metadata))
        if progress is not None:
            progress(number + 1, rounds + warmup)
    return tuple(
        StageTimes(session.name, session.backend, session.precision, {}, clock)
        if isinstance(clock, str)
        else _summary(session, clock.finish()[warmup:], times[warmup:])
        for session, clock, times in zip(sessions, clocks, outside, strict=True)
    )


def batch_seconds(
    run: Callable[[Mapping[str, NDArray]], Mapping[str, NDArray]], batch: Sequence[Image.Image], metadata: ModelMetadata
) -> list[float]:
    """Seconds that preparing a batch, ``run`` and reading its outputs take."""
    marks = [time.perf_counter()]
    tensors = prepare(batch, metadata)
    marks.append(time.perf_counter())
    outputs = run(tensors)
    marks.append(time.perf_counter())
    postprocess(outputs, [(image.height, image.width) for image in batch], metadata)
    marks.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(marks)]


def _clock(session: Session, threads: int | None) -> _Clock | str:
    """What times the stages of a session, or why nothing does."""
    if isinstance(session, PyTorchSession):
        if session.backend.startswith("torch-compile"):
            return "torch.compile makes one program of all stages"
        return _PyTorchClock(session)
    if not isinstance(session, OnnxRuntimeSession) or not session.metadata.stages:
        return f"{session.backend} does not tell its stages apart"
    if session.backend != "onnxruntime-cpu":
        return "ONNX Runtime's profiler sees a GPU's work being started, not being done"
    try:
        return _OnnxClock(session, threads)
    except BackendUnavailableError as error:
        return str(error)


def _summary(
    session: Session, network: Sequence[Mapping[str, float]], outside: Sequence[Sequence[float]]
) -> StageTimes:
    seconds = {stage: [run[stage] for run in network] for stage in network[0]}
    seconds["pre-processing"] = [times[0] for times in outside]
    seconds["post-processing"] = [times[2] for times in outside]
    own = network_parts(session.metadata)  # shown also where they are too short to be measured
    p50_ms = {
        part: float(np.median(seconds[part])) * 1e3
        for part in (*BEFORE, *own, *AFTER)
        if part in seconds and (part in own or any(seconds[part]))
    }
    return StageTimes(session.name, session.backend, session.precision, p50_ms)
