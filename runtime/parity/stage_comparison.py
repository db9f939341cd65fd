"""Where a difference starts: a model against its reference, stage by stage, image by image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.coco_file import Id
from asag.runtime.metadata import ModelMetadata
from asag.runtime.parity.agreement import compare_detections
from asag.runtime.postprocessing import postprocess
from asag.runtime.preprocessing import prepare
from asag.runtime.session import Session
from asag.runtime.stages.compare import Difference, Values, stage_differences
from asag.runtime.stages.graph import DETECTIONS

DETECTION_TOLERANCE = 1e-4
"""For float32, as detections have in parity."""

REDUCED_TOLERANCE = 2e-2
"""For files that compute in less than float32: float16 keeps three digits, and several layers add up."""


@dataclasses.dataclass(frozen=True)
class StageDifference:
    """One stage over all images: largest and mean difference, and what has no counterpart (patches, anchors,
    detections). ``images_over`` are the images on which this stage is the first over the tolerance.
    """

    stage: str
    largest: float
    mean: float
    unmatched: int
    tolerance: float
    images_over: tuple[Id, ...]

    @property
    def over(self) -> bool:
        """Whether the stage is over its tolerance on any image, first or not."""
        return self.unmatched > 0 or not self.largest <= self.tolerance


@dataclasses.dataclass(frozen=True)
class StageReport:
    """The stages of a candidate that both models show, in order. ``images`` are those that were compared."""

    name: str
    backend: str
    precision: str
    stages: tuple[StageDifference, ...]
    images: tuple[Id, ...]

    @property
    def first(self) -> StageDifference | None:
        """Where differences start: the stage that is first over its tolerance on most images; None when all hold."""
        starting = [stage for stage in self.stages if stage.images_over]
        return max(starting, key=lambda stage: len(stage.images_over), default=None)

    def sentence(self) -> str:
        """Where it starts, in one line."""
        model, first = f"{self.name} ({self.backend} {self.precision})", self.first
        if first is None:
            return f"{model}: every stage is within its tolerance on {len(self.images)} images"
        images = ", ".join(map(str, first.images_over[:5])) + (", ..." if len(first.images_over) > 5 else "")
        return (
            f"{model}: differences start at {first.stage} on {len(first.images_over)} of {len(self.images)} images"
            f" ({images})"
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; a difference that is not a finite number is None."""
        stages = [
            {
                **dataclasses.asdict(stage),
                "largest": stage.largest if math.isfinite(stage.largest) else None,
                "mean": stage.mean if math.isfinite(stage.mean) else None,
                "over": stage.over,
            }
            for stage in self.stages
        ]
        first = None if self.first is None else self.first.stage
        return {**dataclasses.asdict(self), "stages": stages, "first": first}


def can_compare(reference: Session, candidate: Any) -> bool:
    """Whether the stages of both can be seen."""
    return reference.shows_stages and isinstance(candidate, Session) and candidate.shows_stages


def compare_stages(
    reference: Session,
    candidate: Session,
    dataset: CocoFolder,
    image_ids: Sequence[Id],
    progress: Callable[[int, int], None] | None = None,
) -> StageReport:
    """Compare every stage on the images, one at a time; an exported file runs on the CPU, whatever it ran on.

    Tolerances are the stages' own where the candidate is float32. ``progress`` gets (images done, all).
    """
    metadata = reference.metadata
    tolerances = {stage.title: stage.tolerance for stage in metadata.stages} | {DETECTIONS: DETECTION_TOLERANCE}
    if candidate.precision != "fp32":
        tolerances = dict.fromkeys(tolerances, REDUCED_TOLERANCE)
    found: list[dict[str, Difference]] = []
    for number, image_id in enumerate(image_ids, start=1):
        image = dataset.load(image_id)
        tensors = prepare([image], metadata)
        ours, theirs = reference.stage_values(tensors), candidate.stage_values(tensors)
        differences = stage_differences(metadata.stages, ours, theirs, float(max(metadata.input_size)))
        size = (image.height, image.width)
        differences[DETECTIONS] = _detection_difference(ours, theirs, metadata, size, tolerances[DETECTIONS])
        found.append(differences)
        if progress is not None:
            progress(number, len(image_ids))
    first: dict[str, list[Id]] = {}
    for image_id, differences in zip(image_ids, found, strict=True):
        over = [stage for stage, value in differences.items() if _is_over(value, tolerances[stage])]
        if over:
            first.setdefault(over[0], []).append(image_id)
    rows = []
    for stage, tolerance in tolerances.items():
        seen = [differences[stage] for differences in found if stage in differences]
        if seen:
            largest, mean, unmatched = (np.array(column, np.float64) for column in zip(*seen, strict=True))
            numbers = float(largest.max()), float(mean.mean()), int(unmatched.sum())
            rows.append(StageDifference(stage, *numbers, tolerance, tuple(first.get(stage, ()))))
    return StageReport(candidate.name, candidate.backend, candidate.precision, tuple(rows), tuple(image_ids))


def _is_over(difference: Difference, tolerance: float) -> bool:
    return difference[2] > 0 or not difference[0] <= tolerance


def _detection_difference(
    reference: Values, candidate: Values, metadata: ModelMetadata, image_size: tuple[int, int], tolerance: float
) -> Difference:
    (ours,), (theirs,) = (postprocess(values, [image_size], metadata) for values in (reference, candidate))
    side = float(max(image_size))
    agreement = compare_detections(
        0,
        ours,
        theirs,
        metadata.max_detections,
        suppressed=metadata.nms_iou is not None,
        score_tolerance=tolerance,
        box_tolerance=tolerance * side,
    )
    largest = max(agreement.score_difference, agreement.box_difference / side)
    mean = float(agreement.score_differences.mean()) if agreement.matched else 0.0
    return largest, mean, agreement.unmatched_reference + agreement.unmatched_candidate


def stage_table(report: StageReport) -> Group:
    """The stages for a terminal, and where the differences start."""
    title = f"Stages of {report.name} against the reference"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, title=title)
    for heading in ("stage", "largest", "mean", "unmatched", "tolerance", "starts here on"):
        table.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    for stage in report.stages:
        here = f"{len(stage.images_over)} images" if stage.images_over else ""
        numbers = (f"{stage.largest:.1e}", f"{stage.mean:.1e}", str(stage.unmatched), f"{stage.tolerance:g}")
        table.add_row(stage.stage, *numbers, here, style="red" if stage.images_over else None)
    return Group(table, Text(report.sentence()))
