"""What a prediction costs as the match of an object (README of the family, section 7).

Everything works on *groups*: an image for the proposals and the heads; a view of the P6 patch, a P5 quarter, or a
probed patch for the anchors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asag.training.assignment import PaddedObjects
from asag.training.boxes import iou_and_giou

CLASS_COST = 2.0
L1_COST = 5.0
GIOU_COST = 2.0
FOCAL_ALPHA = 0.25
FOCAL_EPSILON = 1e-8


@dataclass(frozen=True)
class TargetGroups(PaddedObjects):
    """Objects, and how much each of them weighs."""

    area_factor: Tensor
    """[G, T] float32"""

    @classmethod
    def of_images(cls, objects: PaddedObjects) -> TargetGroups:
        """Groups that are whole images."""
        return cls(objects.boxes, objects.labels, objects.valid, object_area_factor(objects.boxes))

    def repeat(self, times: int) -> TargetGroups:
        """The same groups `times` times over: group `s * G + g` equals group `g`."""
        return TargetGroups(
            self.boxes.repeat(times, 1, 1),
            self.labels.repeat(times, 1),
            self.valid.repeat(times, 1),
            self.area_factor.repeat(times, 1),
        )


def object_area_factor(boxes: Tensor) -> Tensor:
    """`4 - 3 * sqrt(w * h)` of `cxcywh` boxes [..., 4]: small objects weigh up to four times a full-frame one."""
    return 4.0 - 3.0 * (boxes[..., 2] * boxes[..., 3]).sqrt()


def coarse_area_factor(boxes: Tensor) -> Tensor:
    """`1 + 3 * sqrt(w * h)` of `cxcywh` boxes [..., 4]: the P6 patch looks for the large objects."""
    return 1.0 + 3.0 * (boxes[..., 2] * boxes[..., 3]).sqrt()


@torch.no_grad()
def matching_costs(logits: Tensor, boxes: Tensor, valid: Tensor | None, groups: TargetGroups) -> tuple[Tensor, Tensor]:
    """Cost of every (prediction, object) pair, and their IoU: focal class cost, L1 and GIoU, times the area factor.

    logits: [G, Q, C]; boxes: [G, Q, 4] `cxcywh` in the group's frame; valid: [G, Q] bool (None: all). Returns (cost
    [G, Q, T], iou [G, Q, T]); a pair with padding on either side costs infinity.
    """
    columns = groups.labels[:, None, :].expand(-1, logits.shape[1], -1)
    probability = logits.gather(2, columns).sigmoid()
    positive = FOCAL_ALPHA * (1 - probability).square() * -(probability + FOCAL_EPSILON).log()
    negative = (1 - FOCAL_ALPHA) * probability.square() * -(1 - probability + FOCAL_EPSILON).log()
    distance = torch.cdist(boxes, groups.boxes, p=1)
    iou, giou = iou_and_giou(boxes[:, :, None], groups.boxes[:, None])
    cost = CLASS_COST * (positive - negative) + L1_COST * distance - GIOU_COST * giou
    usable = groups.valid[:, None, :]
    if valid is not None:
        usable = usable & valid[:, :, None]
    return (cost * groups.area_factor[:, None, :]).masked_fill(~usable, torch.inf), iou
