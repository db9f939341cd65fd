"""Where a difference starts: an exported file against PyTorch, stage by stage, image by image.

Every difference is relative, so that one tolerance fits all stages: features and queries over the largest magnitude of
the reference's, boxes over the longer side of the input; confidences and scores as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from runtime.backends.onnxruntime_session import OnnxRuntimeSession
from runtime.backends.pytorch_session import PyTorchSession
from runtime.coco_evaluation import CocoFolder
from runtime.metadata import ModelMetadata
from runtime.onnx_stages import OnnxStages
from runtime.parity.agreement import compare_detections
from runtime.postprocessing import postprocess
from runtime.preprocessing import prepare
from runtime.session import Session

STAGES = (
    *("features", "P5/P6 anchors", "P4 patches", "P4 anchors", "P3 patches", "P3 anchors"),
    *("anchors", "proposals", "head", "detections"),
)
"""In the order of computation; levels that a model does not probe are missing in its results."""

TOLERANCES = {**dict.fromkeys(STAGES, 1e-5), **dict.fromkeys(("proposals", "head", "detections"), 1e-4)}
"""For float32. Queries that compete for an object magnify the rounding of their anchors' coordinates, so the stages
that compare queries get as much room as detections have in parity."""

REDUCED_TOLERANCE = 2e-2
"""For files that compute in less than float32: float16 keeps three digits, and several layers add up."""

_SAME_ANCHOR = 0.01
"""Anchors further apart than this share of the input's longer side are not the same one."""

Values = Mapping[str, NDArray]
Difference = tuple[float, float, int]
"""Largest, mean, and how many patches, anchors or detections have no counterpart."""


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
    images_over: tuple[int, ...]

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
    images: tuple[int, ...]

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
    """Whether the stages of both can be seen: PyTorch as the reference, an exported file as the candidate."""
    return isinstance(reference, PyTorchSession) and isinstance(candidate, OnnxRuntimeSession)


def compare_stages(
    reference: PyTorchSession,
    candidate: OnnxRuntimeSession,
    dataset: CocoFolder,
    image_ids: Sequence[int],
    tolerance: float | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StageReport:
    """Compare every stage on the images, one at a time; the candidate's file runs on the CPU, whatever it ran on.

    ``tolerance`` is for all stages; by default that of the candidate's precision. ``progress`` gets (images done,
    all).
    """
    tolerances = _tolerances(candidate.precision, tolerance)
    stages = OnnxStages(candidate.path, threads)
    found: list[dict[str, Difference]] = []
    for number, image_id in enumerate(image_ids, start=1):
        image = dataset.load(image_id)
        tensors = prepare([image], reference.metadata)
        ours, theirs = reference.stage_values(tensors), stages.run(tensors)
        found.append(image_differences(ours, theirs, reference.metadata, (image.height, image.width), tolerances))
        if progress is not None:
            progress(number, len(image_ids))
    first: dict[str, list[int]] = {}
    for image_id, differences in zip(image_ids, found, strict=True):
        over = [stage for stage in STAGES if stage in differences and _is_over(differences[stage], tolerances[stage])]
        if over:
            first.setdefault(over[0], []).append(image_id)
    rows = []
    for stage in STAGES:
        seen = [differences[stage] for differences in found if stage in differences]
        if seen:
            largest, mean, unmatched = (np.array(column, np.float64) for column in zip(*seen, strict=True))
            images_over = tuple(first.get(stage, ()))
            rows.append(
                StageDifference(
                    stage,
                    float(largest.max()),
                    float(mean.mean()),
                    int(unmatched.sum()),
                    tolerances[stage],
                    images_over,
                )
            )
    return StageReport(candidate.name, candidate.backend, candidate.precision, tuple(rows), tuple(image_ids))


def _tolerances(precision: str, tolerance: float | None) -> dict[str, float]:
    if tolerance is not None:
        return dict.fromkeys(STAGES, tolerance)
    return TOLERANCES if precision == "fp32" else dict.fromkeys(STAGES, REDUCED_TOLERANCE)


def _is_over(difference: Difference, tolerance: float) -> bool:
    return difference[2] > 0 or not difference[0] <= tolerance


def image_differences(
    reference: Values,
    candidate: Values,
    metadata: ModelMetadata,
    image_size: tuple[int, int],
    tolerances: Mapping[str, float],
) -> dict[str, Difference]:
    """The differences of one image (a batch of one) for every stage that both sides show."""
    side = float(max(metadata.input_size))
    found = {"features": _merge([_relative(reference[name], candidate[name]) for name in ("p2", "p3", "p4", "p5")])}
    fixed = (reference["fixed_anchors"][0], candidate["fixed_anchors"][0])
    found["P5/P6 anchors"] = _anchor_difference(*fixed, side)
    for level in ("p4", "p3"):
        if f"{level}_map" in reference and f"{level}_map" in candidate:
            patches, anchors = _level_differences(level, reference, candidate, side)
            found[f"{level.upper()} patches"], found[f"{level.upper()} anchors"] = patches, anchors
    ours, theirs = _pair_anchors(reference, candidate, side, tolerances["anchors"])
    counts = [int(values["valid"][0].sum()) for values in (reference, candidate)]
    boxes = np.abs(reference["anchors"][0][ours].astype(np.float64) - candidate["anchors"][0][theirs]) / side
    found["anchors"] = (*_largest_and_mean(boxes), sum(counts) - 2 * len(ours))

    def rows(name: str, divisor: float | None) -> Difference:
        return _relative(reference[name][0][ours], candidate[name][0][theirs], divisor)

    proposals = [("queries", None), ("proposal_xyzr", side / 4), ("proposal_pixels", side)]
    for stage, parts in (("proposals", proposals), ("head", [("head_scores", 1.0), ("head_boxes", 1.0)])):
        shown = [rows(name, divisor) for name, divisor in parts if name in reference and name in candidate]
        if shown:
            found[stage] = _merge(shown)
    found["detections"] = _detection_difference(reference, candidate, metadata, image_size, tolerances["detections"])
    return found


def _relative(reference: NDArray, candidate: NDArray, divisor: float | None = None) -> Difference:
    """Differences over ``divisor``, by default the largest magnitude of the reference."""
    difference = np.abs(reference.astype(np.float64) - candidate)
    scale = divisor or float(np.abs(reference).max(initial=0.0)) or 1.0
    return *_largest_and_mean(difference / scale), 0


def _largest_and_mean(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Both infinite where a difference is not a number, so that no comparison lets it pass."""
    if not differences.size:
        return 0.0, 0.0
    if np.isnan(differences).any():
        return math.inf, math.inf
    return float(differences.max()), float(differences.mean())


def _merge(parts: Sequence[Difference]) -> Difference:
    return max(p[0] for p in parts), sum(p[1] for p in parts) / len(parts), sum(p[2] for p in parts)


def _anchor_difference(reference: NDArray, candidate: NDArray, side: float) -> Difference:
    """Anchors [A, 5] in the same places: boxes over the input's side, confidences as they are."""
    scale = np.array([side, side, side, side, 1.0])
    return *_largest_and_mean(np.abs(reference.astype(np.float64) - candidate) / scale), 0


def _level_differences(level: str, reference: Values, candidate: Values, side: float) -> tuple[Difference, Difference]:
    """Of the patches (the map they are cut from, and where), and of the anchors in patches that both have."""
    places: list[dict[tuple[int, int], int]] = []
    for values in (reference, candidate):
        corners, valid = values[f"{level}_corners"][0], values[f"{level}_valid"][0]
        places.append({(int(x), int(y)): slot for slot, (x, y) in enumerate(corners) if valid[slot]})
    common = sorted(set(places[0]) & set(places[1]))
    largest, mean, _ = _relative(reference[f"{level}_map"], candidate[f"{level}_map"])
    patches = (largest, mean, len(places[0]) + len(places[1]) - 2 * len(common))
    if not common:
        return patches, (0.0, 0.0, 0)
    both = []
    for values, of_corner in zip((reference, candidate), places, strict=True):
        capacity = len(values[f"{level}_valid"][0])
        by_slot = values[f"{level}_anchors"][0].reshape(capacity, -1, 5)
        both.append(by_slot[[of_corner[corner] for corner in common]].reshape(-1, 5))
    return patches, _anchor_difference(both[0], both[1], side)


def _pair_anchors(
    reference: Values, candidate: Values, side: float, tolerance: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the same anchors in both lists, one to one, so that another order is no difference."""
    ours, theirs = (np.flatnonzero(values["valid"][0]) for values in (reference, candidate))
    boxes, others = (
        values["anchors"][0][places].astype(np.float64) for values, places in ((reference, ours), (candidate, theirs))
    )
    if len(ours) == len(theirs) and np.abs(boxes - others).max(initial=0.0) <= tolerance * side:
        return ours, theirs
    distance = np.abs(boxes[:, None] - others[None]).max(axis=2, initial=0.0) / side
    rows, columns = np.nonzero(distance <= _SAME_ANCHOR)
    free_rows, free_columns, pairs = np.ones(len(ours), bool), np.ones(len(theirs), bool), []
    for place in np.argsort(distance[rows, columns], kind="stable"):
        row, column = rows[place], columns[place]
        if free_rows[row] and free_columns[column]:
            free_rows[row] = free_columns[column] = False
            pairs.append((row, column))
    chosen = np.array(pairs, np.int64).reshape(-1, 2)
    return ours[chosen[:, 0]], theirs[chosen[:, 1]]


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
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, title=f"Stages of {report.name} against PyTorch")
    for heading in ("stage", "largest", "mean", "unmatched", "tolerance", "starts here on"):
        table.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    for stage in report.stages:
        here = f"{len(stage.images_over)} images" if stage.images_over else ""
        numbers = (f"{stage.largest:.1e}", f"{stage.mean:.1e}", str(stage.unmatched), f"{stage.tolerance:g}")
        table.add_row(stage.stage, *numbers, here, style="red" if stage.images_over else None)
    return Group(table, Text(report.sentence()))
