"""How far two backends agree on one image: a one-to-one matching of their detections."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from asag.runtime.coco_file import Id
from asag.runtime.postprocessing import Detections, box_iou

SCORE_TOLERANCE = 1e-4
BOX_TOLERANCE = 0.05

# Detections further apart than this are different objects, not one detection computed differently.
_SAME_OBJECT_IOU = 0.5


@dataclasses.dataclass(frozen=True)
class ImageAgreement:
    """Comparison of a candidate's detections with the reference's on one image.

    ``score_difference`` and ``box_difference`` (pixels of the original image, largest of the four coordinates) are the
    largest over the ``matched`` pairs. ``unmatched_reference`` and ``unmatched_candidate`` count detections without a
    partner. ``cut_ties`` are left out of these: the other list was cut at their score, and which of equals makes the
    cut is open. ``swaps`` are matched pairs at another rank, as near-equal scores change places.
    ``score_differences``, ``box_differences`` and ``ious`` are those of each matched pair.
    """

    image_id: Id
    matched: int
    unmatched_reference: int
    unmatched_candidate: int
    cut_ties: int
    swaps: int
    score_difference: float
    box_difference: float
    score_differences: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros(0), compare=False)
    box_differences: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros(0), compare=False)
    ious: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros(0), compare=False)

    def within(self, score_tolerance: float = SCORE_TOLERANCE, box_tolerance: float = BOX_TOLERANCE) -> bool:
        """Whether the detections are the same apart from ties."""
        return (
            self.unmatched_reference == 0
            and self.unmatched_candidate == 0
            and self.score_difference <= score_tolerance
            and self.box_difference <= box_tolerance
        )


def compare_detections(
    image_id: Id,
    reference: Detections,
    candidate: Detections,
    max_detections: int,
    *,
    suppressed: bool = False,
    score_tolerance: float = SCORE_TOLERANCE,
    box_tolerance: float = BOX_TOLERANCE,
) -> ImageAgreement:
    """Match detections of the same label one to one, closest pairs first, and measure the differences.

    Closeness is the score difference and the box difference, each in units of its tolerance. ``max_detections`` is
    the length at which a list was cut; with ``suppressed``, suppression after that cut made the lists shorter.
    """
    pairs = _match(reference, candidate, score_tolerance, box_tolerance)
    alone_reference = np.setdiff1d(np.arange(len(reference)), pairs[:, 0])
    alone_candidate = np.setdiff1d(np.arange(len(candidate)), pairs[:, 1])
    # A detection may be missing from a list without being wrong only where that list was cut.
    reference_is_cut = suppressed or len(reference) >= max_detections
    candidate_is_cut = suppressed or len(candidate) >= max_detections
    ties_reference = _at_the_cut(reference, alone_reference, candidate, score_tolerance) if candidate_is_cut else 0
    ties_candidate = _at_the_cut(candidate, alone_candidate, reference, score_tolerance) if reference_is_cut else 0
    scores, boxes = _differences(reference, candidate, pairs)
    in_reference_order = pairs[np.argsort(pairs[:, 0], kind="stable"), 1]
    return ImageAgreement(
        image_id=image_id,
        matched=len(pairs),
        unmatched_reference=len(alone_reference) - ties_reference,
        unmatched_candidate=len(alone_candidate) - ties_candidate,
        cut_ties=ties_reference + ties_candidate,
        swaps=int((in_reference_order != np.sort(in_reference_order)).sum()),
        score_difference=float(scores.max(initial=0.0)),
        box_difference=float(boxes.max(initial=0.0)),
        score_differences=scores,
        box_differences=boxes.max(axis=1, initial=0.0),
        ious=_pair_ious(_wide(reference.boxes)[pairs[:, 0]], _wide(candidate.boxes)[pairs[:, 1]], boxes),
    )


def differing(
    reference: Detections,
    candidate: Detections,
    score_tolerance: float = SCORE_TOLERANCE,
    box_tolerance: float = BOX_TOLERANCE,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of the reference's detections have no partner, and which of the candidate's none within the tolerances."""
    pairs = _match(reference, candidate, score_tolerance, box_tolerance)
    missing, different = np.ones(len(reference), bool), np.ones(len(candidate), bool)
    missing[pairs[:, 0]] = False
    scores, boxes = _differences(reference, candidate, pairs)
    different[pairs[:, 1]] = (scores > score_tolerance) | (boxes.max(axis=1, initial=0.0) > box_tolerance)
    return missing, different


def _differences(
    reference: Detections, candidate: Detections, pairs: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of matched pairs [M, 2]: absolute differences of scores [M] and of boxes' coordinates [M, 4]."""
    scores = np.abs(_wide(reference.scores)[pairs[:, 0]] - _wide(candidate.scores)[pairs[:, 1]])
    boxes = np.abs(_wide(reference.boxes)[pairs[:, 0]] - _wide(candidate.boxes)[pairs[:, 1]])
    return scores, boxes


def _pair_ious(boxes: NDArray, others: NDArray, differences: NDArray) -> NDArray[np.float64]:
    """Intersection over union [M] of boxes [M, 4] pair by pair; 1 where corners are the same, also without area."""
    sides = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    intersection = np.clip(sides, 0, None).prod(axis=1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (others[:, 2:] - others[:, :2]).prod(axis=1) - intersection
    ious = np.divide(intersection, union, out=np.zeros(len(boxes)), where=union > 0)
    return np.where(differences.max(axis=1, initial=0.0) == 0, 1.0, ious)


def _wide(values: NDArray) -> NDArray[np.float64]:
    return values.astype(np.float64)


def _match(
    reference: Detections, candidate: Detections, score_tolerance: float, box_tolerance: float
) -> NDArray[np.int64]:
    """Index pairs [M, 2] (reference, candidate), closest first."""
    boxes, others = _wide(reference.boxes), _wide(candidate.boxes)
    score_units = np.abs(_wide(reference.scores)[:, None] - _wide(candidate.scores)[None, :]) / score_tolerance
    box_units = np.abs(boxes[:, None, :] - others[None, :, :]).max(axis=2, initial=0.0) / box_tolerance
    # Boxes of no area have no IoU; they are still one detection when their corners agree.
    possible = (reference.labels[:, None] == candidate.labels[None, :]) & (
        (box_iou(boxes, others) >= _SAME_OBJECT_IOU) | (box_units <= 1)
    )
    rows, columns = np.nonzero(possible)
    order = np.argsort((score_units + box_units)[rows, columns], kind="stable")
    free_rows, free_columns = np.ones(len(reference), bool), np.ones(len(candidate), bool)
    pairs = []
    for row, column in zip(rows[order], columns[order], strict=True):
        if free_rows[row] and free_columns[column]:
            free_rows[row] = free_columns[column] = False
            pairs.append((row, column))
    return np.array(pairs, np.int64).reshape(-1, 2)


def _at_the_cut(detections: Detections, alone: NDArray, other: Detections, score_tolerance: float) -> int:
    """How many of the detections without a partner score no more than the last that made it into the other list."""
    if not len(other):
        return 0
    return int((detections.scores[alone] <= other.scores.min() + score_tolerance).sum())
