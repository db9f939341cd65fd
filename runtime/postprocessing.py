"""Model outputs to detections in pixels of the original images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag.runtime.errors import BackendUnavailableError
from asag.runtime.metadata import ModelMetadata

OUTPUT_NAMES = ("boxes", "scores", "labels", "overflow")


@dataclasses.dataclass(frozen=True)
class Detections:
    """Detections of one image, by falling score.

    ``boxes`` [N, 4] float32 ``xyxy`` in pixels of the original image (not clipped to it), ``scores`` [N] float32,
    ``labels`` [N] int64 category ids. ``overflow`` counts the places the model wanted to look at more closely and
    could not, because a capacity was full. ``image_size`` is the original (height, width) in pixels.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    overflow: int
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, which: NDArray) -> Detections:
        """The detections of a boolean mask or an index array."""
        return dataclasses.replace(self, boxes=self.boxes[which], scores=self.scores[which], labels=self.labels[which])

    def above(self, score_threshold: float) -> Detections:
        """The detections whose score is at least ``score_threshold``."""
        return self.select(self.scores >= score_threshold)

    def to_supervision(self, metadata: ModelMetadata | None = None) -> Any:
        """The same as a ``supervision.Detections``, for its annotators, trackers and metrics.

        ``xyxy`` stays in pixels of the original image, ``class_id`` are the category ids; with the model's `metadata`
        ``data["class_name"]`` holds their names. Raises BackendUnavailableError where supervision is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise BackendUnavailableError("supervision is not installed: pip install 'asag[supervision]'") from None
        data = {}
        if metadata is not None:
            data["class_name"] = np.array([metadata.category_name(int(label)) for label in self.labels], np.str_)
        return supervision.Detections(xyxy=self.boxes, confidence=self.scores, class_id=self.labels, data=data)


def box_iou(boxes: NDArray, others: NDArray) -> NDArray:
    """Intersection over union [N, M] of boxes ``xyxy`` [N, 4] and [M, 4]; 0 where both areas are 0."""
    top_left = np.maximum(boxes[:, None, :2], others[None, :, :2])
    bottom_right = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    sides = np.clip(bottom_right - top_left, 0, None)
    intersection = sides[..., 0] * sides[..., 1]
    union = _area(boxes)[:, None] + _area(others)[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _area(boxes: NDArray) -> NDArray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def non_maximum_suppression(
    boxes: NDArray, scores: NDArray, labels: NDArray, iou_threshold: float
) -> NDArray[np.int64]:
    """Indices of the boxes that survive class-wise greedy suppression, by falling score (ties in given order).

    A box is dropped when its IoU with a kept box of the same label and a higher score is above ``iou_threshold``.
    """
    order = np.argsort(-scores, kind="stable")
    boxes, labels = boxes[order], labels[order]
    overlaps = (box_iou(boxes, boxes) > iou_threshold) & (labels[:, None] == labels[None, :])
    alive = np.ones(len(order), bool)
    for index in range(len(order)):
        if alive[index]:
            alive[index + 1 :] &= ~overlaps[index, index + 1 :]
    return order[alive]


def postprocess(
    outputs: Mapping[str, NDArray],
    image_sizes: Sequence[tuple[int, int]],
    metadata: ModelMetadata,
    score_threshold: float = 0.0,
) -> list[Detections]:
    """Detections of a batch from the model's outputs.

    ``outputs``: ``boxes`` [B, N, 4] ``xyxy`` as fractions of the content, ``scores`` [B, N], ``labels`` [B, N]
    category ids, ``overflow`` [B]. ``image_sizes``: original (height, width) in pixels of each image. Suppression runs
    where the metadata name a threshold. Left out are entries with a score under ``score_threshold``, padding entries
    (score 0), and entries whose score or box is not finite.
    """
    results = []
    for index, (height, width) in enumerate(image_sizes):
        scores = np.asarray(outputs["scores"][index], np.float32)
        fractions = np.asarray(outputs["boxes"][index], np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # what is no finite pixel in the end is left out
            pixels = fractions * np.array([width, height, width, height], np.float32)
        finite = np.isfinite(scores) & np.isfinite(pixels).all(axis=1)
        kept = np.flatnonzero(finite & (scores > 0) & (scores >= score_threshold))
        kept = kept[np.argsort(-scores[kept], kind="stable")]
        boxes = pixels[kept]
        labels = np.asarray(outputs["labels"][index], np.int64)[kept]
        detections = Detections(boxes, scores[kept], labels, int(outputs["overflow"][index]), (height, width))
        if metadata.nms_iou is not None:
            survivors = non_maximum_suppression(boxes, detections.scores, labels, metadata.nms_iou)
            detections = detections.select(survivors)
        results.append(detections)
    return results
