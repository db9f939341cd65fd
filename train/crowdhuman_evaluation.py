"""CrowdHuman's measures: AP at IoU 0.5, log-average miss rate (mMR) and recall, with regions to ignore.

Matching is the Caltech benchmark's: the detections of an image, by falling score, each take the free object with which
they overlap most, above IoU 0.5. One that finds none but lies to more than one half in a region to ignore (the overlap
over the detection's own area) counts neither way; any number of detections may do so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asag.runtime.coco_dataset import CocoFolder, clipped_boxes
from asag.runtime.coco_file import Id
from asag.runtime.postprocessing import Detections, box_iou
from asag.runtime.records import to_json

IOU_THRESHOLD = 0.5
REFERENCE_RATES = np.logspace(-2, 0, 9)
"""False positives per image at which the miss rate is read: nine of them, evenly spaced in the logarithm."""
_LOWEST_MISS_RATE = 1e-10


@dataclass(frozen=True)
class CrowdHumanResult:
    """All from 0 to 1. ``ap``: area under precision over recall; ``log_average_miss_rate``: geometric mean of the miss
    rates at the reference rates (lower is better); ``recall`` over all detections. Not-a-number without objects."""

    ap: float
    log_average_miss_rate: float
    recall: float
    objects: int
    images: int

    def to_json(self) -> dict[str, float | int | None]:
        """The values with None for not-a-number, which JSON does not have."""
        return to_json(self)


@dataclass(frozen=True)
class ImageCase:
    """One image: `objects` [n, 4], `ignored` [m, 4] and detected `boxes` [d, 4] as ``xyxy``, `scores` [d]."""

    objects: NDArray[np.float64]
    ignored: NDArray[np.float64]
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]


def evaluate_crowdhuman(dataset: CocoFolder, detections: Mapping[Id, Detections]) -> CrowdHumanResult:
    """The measures on the images of `detections` (keys are image ids); all classes count as one.

    Annotations with ``iscrowd`` or ``ignore`` are regions to ignore. Boxes of both sides are clipped to the image.
    """
    cases = []
    for image_id, found in detections.items():
        image, held = dataset.images[image_id], dataset.objects(image_id)
        annotated = clipped_boxes(dataset.annotations.boxes[held], image.height, image.width)
        ignored = dataset.annotations.crowd[held]
        boxes = np.clip(found.boxes.astype(np.float64), 0, [image.width, image.height] * 2)
        cases.append(ImageCase(annotated[~ignored], annotated[ignored], boxes, found.scores.astype(np.float64)))
    return measure(cases)


def measure(cases: Sequence[ImageCase]) -> CrowdHumanResult:
    """The measures over some images."""
    scores, correct = [], []
    for case in cases:
        kept, hits = match_detections(case)
        scores.append(case.scores[kept])
        correct.append(hits)
    objects = sum(len(case.objects) for case in cases)
    if not objects:
        return CrowdHumanResult(np.nan, np.nan, np.nan, 0, len(cases))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hits = np.concatenate(correct)[order]
    true_positives, false_positives = np.cumsum(hits), np.cumsum(~hits)
    recall = true_positives / objects
    return CrowdHumanResult(
        ap=average_precision(true_positives, false_positives, objects),
        log_average_miss_rate=log_average_miss_rate(recall, false_positives / len(cases)),
        recall=float(recall[-1]) if len(recall) else 0.0,
        objects=objects,
        images=len(cases),
    )


def match_detections(case: ImageCase) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Indices of the detections that count, by falling score, and whether each of them found an object."""
    order = np.argsort(-case.scores, kind="stable")
    overlaps = box_iou(case.boxes, case.objects)
    inside = _share_inside(case.boxes, case.ignored).max(axis=1, initial=0.0)
    free = np.ones(len(case.objects), bool)
    kept, hits = [], []
    for index in order:
        candidates = np.where(free, overlaps[index], -1.0)
        best = int(candidates.argmax()) if len(candidates) else -1
        hit = best >= 0 and candidates[best] > IOU_THRESHOLD
        if hit:
            free[best] = False
        elif inside[index] > IOU_THRESHOLD:
            continue
        kept.append(int(index))
        hits.append(hit)
    return np.asarray(kept, np.int64), np.asarray(hits, bool)


def average_precision(true_positives: NDArray, false_positives: NDArray, objects: int) -> float:
    """Area under the precision as it is measured, over the recall, by the trapezoid rule from recall 0 on."""
    if not len(true_positives):
        return 0.0
    recall = true_positives / objects
    precision = true_positives / (true_positives + false_positives)
    recall, precision = np.concatenate(([0.0], recall)), np.concatenate((precision[:1], precision))
    return float((np.diff(recall) * (precision[1:] + precision[:-1]) / 2).sum())


def log_average_miss_rate(recall: NDArray, false_positives_per_image: NDArray) -> float:
    """Geometric mean of ``1 - recall`` at the reference rates, each read at the last score that does not exceed it.

    `recall` and `false_positives_per_image` [d] are by falling score. Where even the highest score exceeds a rate,
    everything is missed at it.
    """
    last = np.searchsorted(false_positives_per_image, REFERENCE_RATES, side="right") - 1
    missed = np.ones(len(REFERENCE_RATES))
    reached = last >= 0
    missed[reached] = 1 - recall[last[reached]]
    return float(np.exp(np.log(np.maximum(missed, _LOWEST_MISS_RATE)).mean()))


def _share_inside(boxes: NDArray, regions: NDArray) -> NDArray:
    """Share of each box [d, 4] that lies in each region [m, 4]: [d, m]."""
    top_left = np.maximum(boxes[:, None, :2], regions[None, :, :2])
    bottom_right = np.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    sides = np.clip(bottom_right - top_left, 0, None)
    intersection = sides[..., 0] * sides[..., 1]
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)[:, None]
    return np.divide(intersection, area, out=np.zeros_like(intersection), where=area > 0)
