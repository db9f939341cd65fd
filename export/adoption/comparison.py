"""Does an adopted file give the detections of the foreign one? Both run on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from asag.export.adoption.execution import FileRun, foreign_detections, foreign_feeds
from asag.export.adoption.plan import Plan
from asag.runtime.metadata import ModelMetadata
from asag.runtime.parity.agreement import SCORE_TOLERANCE, compare_detections
from asag.runtime.postprocessing import Detections, postprocess
from asag.runtime.preprocessing import prepare

LEAST_SCORE = 0.05
"""Detections under it are not looked for."""


@dataclass(frozen=True)
class Closeness:
    """How close two detections of a class are that are one: the least IoU, or else the largest difference of corners in
    pixels, which alone says anything of a box less than a pixel wide; and the largest difference of scores.
    """

    iou: float
    corner: float
    score: float


SAME = Closeness(0.999, 0.01, SCORE_TOLERANCE)

IN_HALF = Closeness(0.9, 0.01, 0.02)
"""Where one of the files computes in 16 bits: near-equal queries change places, and numbers have three digits."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Comparison:
    """Of `detections` of the foreign file, over all pictures, `found` are in the adopted one; ``differing`` are names
    of the pictures where not all are.
    """

    detections: int
    found: int
    score_difference: float
    differing: tuple[str, ...]


def compare_files(
    foreign: FileRun,
    adopted: FileRun,
    plan: Plan,
    metadata: ModelMetadata,
    pictures: Sequence[tuple[str, Image.Image]],
    *,
    close: Closeness = SAME,
    at_once: int = 2,
) -> Comparison:
    """Run both on every picture; the adopted file, where its batch is open, on `at_once` of them.

    A detection is found where the other file has one of its class that is close to it; ties at the cut do not count, as
    in parity. Raises ValueError for outputs that cannot be those of the layout, and for a class index without a class.
    """
    total = found = 0
    difference = 0.0
    differing = []
    at_once = plan.interface.batch or at_once
    for start in range(0, len(pictures), at_once):
        batch = [pictures[min(start + place, len(pictures) - 1)] for place in range(at_once)]
        tensors = prepare([picture for _, picture in batch], metadata)
        ours = adopted.run(tensors)
        theirs = _foreign(foreign, tensors, plan)
        for place, (name, picture) in enumerate(batch[: len(pictures) - start]):
            size = (picture.height, picture.width)
            wanted = _detections(theirs[place], size)
            given = postprocess({key: values[place : place + 1] for key, values in ours.items()}, [size], metadata)[0]
            lacking, difference_here = missing(wanted, given, metadata.max_detections, close)
            total += len(wanted.above(LEAST_SCORE))
            found += len(wanted.above(LEAST_SCORE)) - lacking
            difference = max(difference, difference_here)
            if lacking:
                differing.append(name)
    return Comparison(total, found, difference, tuple(differing))


def _foreign(run: FileRun, tensors: Mapping[str, Array], plan: Plan) -> list[tuple[Array, Array, Array]]:
    """What the foreign file finds in each image, which it gets alone where its batch is open."""
    if plan.interface.batch:
        parts = [slice(None)]
    else:
        parts = [slice(place, place + 1) for place in range(len(tensors["images"]))]
    found = []
    for part in parts:
        images, sizes = tensors["images"][part], tensors["sizes"][part]
        found += foreign_detections(run.run(foreign_feeds(images, sizes, plan)), sizes, plan)
    for boxes, scores, labels in found:
        _check_plausible(boxes, scores, labels, plan)
    return found


def _check_plausible(boxes: Array, scores: Array, labels: Array, plan: Plan) -> None:
    layout = plan.interface.layout.name
    if len(scores) and (scores.min() < -1e-3 or scores.max() > 1 + 1e-3):
        raise ValueError(
            f"scores are {scores.min():.3g} to {scores.max():.3g}, not 0 to 1: it is not of layout {layout}"
        )
    if len(boxes) and np.median(np.abs(boxes)) > 4:
        raise ValueError(f"boxes reach {np.abs(boxes).max():.3g} times the image: it is not of layout {layout}")
    if len(boxes) and plan.interface.layout.frame == "pixels" and np.abs(boxes).max() * max(plan.size) <= 4:
        raise ValueError(f"boxes are no pixels of the input, none passes {np.abs(boxes).max() * max(plan.size):.3g}")
    unknown = (labels < 0) & (scores >= LEAST_SCORE)
    if unknown.any() and None not in plan.classes.columns:
        raise ValueError(
            f"a detection has a class beyond the {len(plan.classes.columns)} of --classes; give all of them"
        )


def _detections(found: tuple[Array, Array, Array], size: tuple[int, int]) -> Detections:
    boxes, scores, labels = found
    known = labels >= 0
    pixels = boxes * np.array([size[1], size[0], size[1], size[0]])
    return Detections(
        pixels[known].astype(np.float32), scores[known].astype(np.float32), labels[known].astype(np.int64), 0, size
    )


def missing(wanted: Detections, given: Detections, most: int, close: Closeness) -> tuple[int, float]:
    """How many detections have no partner, and the largest difference of a pair's scores."""
    agreement = compare_detections(
        0,
        wanted.above(LEAST_SCORE),
        given.above(LEAST_SCORE - close.score),
        most,
        score_tolerance=close.score,
    )
    off = (agreement.ious < close.iou) & (agreement.box_differences > close.corner) & (agreement.ious > 0)
    off |= agreement.score_differences > close.score
    return agreement.unmatched_reference + int(off.sum()), agreement.score_difference
