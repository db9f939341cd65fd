"""How sure an average precision is: bootstrap over images, from pycocotools' results of each image.

pycocotools matches detections to objects image by image, once. A bootstrap sample draws as many images as there are,
with replacement; an image drawn twice counts twice. That only changes weights, so the matching is never repeated.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAMPLES = 1000
SEED = 0
CONFIDENCE = 0.95

_RECALLS = np.linspace(0.0, 1.0, 101)
_CHUNK_ELEMENTS = 4_000_000


@dataclasses.dataclass(frozen=True)
class CategoryMatches:
    """Detections of one category over all images, by falling score.

    ``image`` [D] is each one's image (a place in the list of images), ``matched`` and ``ignored`` [T, D] say for each
    IoU threshold whether it found an object and whether it counts at all, ``objects`` [I] is the number of objects of
    each image.
    """

    image: NDArray[np.int64]
    matched: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    objects: NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Interval:
    """An interval that holds the value with 95 % confidence."""

    low: float
    high: float


def collect_matches(evaluation: Any) -> list[CategoryMatches]:
    """The results of each image for objects of every size, from a ``COCOeval`` after ``evaluate()``."""
    images, areas = len(evaluation.params.imgIds), len(evaluation.params.areaRng)
    found = []
    for category in range(len(evaluation.params.catIds)):
        first = category * areas * images
        entries = [(place, entry) for place, entry in enumerate(evaluation.evalImgs[first : first + images]) if entry]
        objects = np.zeros(images, np.int64)
        for place, entry in entries:
            objects[place] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
        if not entries or not objects.any():
            continue
        scores = np.concatenate([entry["dtScores"] for _, entry in entries])
        order = np.argsort(-scores, kind="mergesort")  # as pycocotools, so that ties fall the same way
        found.append(
            CategoryMatches(
                image=np.repeat([place for place, _ in entries], [len(entry["dtScores"]) for _, entry in entries])[
                    order
                ],
                matched=np.concatenate([entry["dtMatches"] for _, entry in entries], axis=1)[:, order] != 0,
                ignored=np.concatenate([entry["dtIgnore"] for _, entry in entries], axis=1)[:, order].astype(bool),
                objects=objects,
            )
        )
    return found


def draw_weights(images: int, samples: int = SAMPLES, seed: int = SEED) -> NDArray[np.float64]:
    """How often each image is drawn, [samples, images]; the same for the same arguments."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), samples).astype(np.float64)


def average_precision(matches: Sequence[CategoryMatches], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """COCO's AP (mean over categories and IoU thresholds) for each row of ``weights`` [S, I] -> [S].

    What pycocotools gives for a dataset that holds each image so often, but for the order of equal scores within one
    image. Not a number where a row holds no image with an object.
    """
    largest = max((len(category.image) for category in matches), default=1)
    rows = max(1, _CHUNK_ELEMENTS // max(1, largest))
    parts = [_average_precision(matches, weights[start : start + rows]) for start in range(0, len(weights), rows)]
    return np.concatenate(parts)


def _average_precision(matches: Sequence[CategoryMatches], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.zeros(len(weights))
    categories = np.zeros(len(weights))
    for category in matches:
        objects = weights @ category.objects
        present = objects > 0
        total[present] += _category_precision(category, weights[present], objects[present])
        categories += present
    with np.errstate(invalid="ignore"):
        return total / categories


def _category_precision(
    category: CategoryMatches, weights: NDArray[np.float64], objects: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Precision at 101 recalls, averaged over these and the IoU thresholds, for each row of weights."""
    drawn = weights[:, category.image]
    result = np.zeros(len(weights))
    ignored_before: NDArray[np.bool_] | None = None
    for matched, ignored in zip(category.matched, category.ignored, strict=True):
        if ignored_before is None or not np.array_equal(ignored, ignored_before):
            ranks = np.cumsum(np.where(ignored, 0.0, drawn), axis=1)
            ignored_before = ignored
        hits = np.flatnonzero(matched & ~ignored)
        if not len(hits):
            continue
        # Precision falls between two hits, so its envelope is decided at the hits alone.
        found = np.cumsum(drawn[:, hits], axis=1)
        precision = found / (ranks[:, hits] + np.spacing(1))
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(_RECALLS, found / objects[:, None], side="right")
        result += (envelope * np.diff(reached, axis=1, prepend=0)).sum(axis=1)
    return result / (len(_RECALLS) * len(category.matched))


def interval(values: NDArray[np.float64]) -> Interval | None:
    """The middle :data:`CONFIDENCE` of the values, None where none is a number."""
    tail = (1 - CONFIDENCE) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = np.nanquantile(values, [tail, 1 - tail])
    return None if np.isnan(low) else Interval(float(low), float(high))
