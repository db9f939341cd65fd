"""One-to-one assignment of predictions to objects (specification section 7, "Matching").

Everything works on *groups*: independent matching problems of equal padded size. A group is an image for the
proposals and the heads, a flip of the P6 patch, a P5 quarter, or one probed patch for the anchors. Boxes are
``cxcywh``, in units of the group's own frame (the image's content, or the patch).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from asag.training.transfer import to_device

CLASS_COST = 2.0
L1_COST = 5.0
GIOU_COST = 2.0
FOCAL_ALPHA = 0.25
FOCAL_EPSILON = 1e-8
# Far below the area of any real box or union of boxes: only keeps 0/0 out.
SMALLEST_AREA = 1e-12


@dataclass(frozen=True)
class TargetGroups:
    """The objects of G groups, padded to T each.

    ``boxes`` [G, T, 4] float32 ``cxcywh`` in the group's frame; ``labels`` [G, T] int64 class indices;
    ``valid`` [G, T] bool, False for padding; ``area_factor`` [G, T] float32, the factor ``a`` of each object.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    area_factor: Tensor

    def repeat(self, times: int) -> TargetGroups:
        """The same groups ``times`` times over: group ``s * G + g`` equals group ``g``."""
        return TargetGroups(
            self.boxes.repeat(times, 1, 1),
            self.labels.repeat(times, 1),
            self.valid.repeat(times, 1),
            self.area_factor.repeat(times, 1),
        )


@dataclass(frozen=True)
class Matches:
    """Matched pairs: three int64 tensors [M], the pair's group, its prediction and its object in the group."""

    group: Tensor
    query: Tensor
    target: Tensor


def object_area_factor(boxes: Tensor) -> Tensor:
    """``4 - 3 * sqrt(w * h)`` of ``cxcywh`` boxes [..., 4]: small objects weigh up to four times a full-frame one."""
    return 4.0 - 3.0 * (boxes[..., 2] * boxes[..., 3]).sqrt()


def coarse_area_factor(boxes: Tensor) -> Tensor:
    """``1 + 3 * sqrt(w * h)`` of ``cxcywh`` boxes [..., 4]: the P6 patch looks for the large objects."""
    return 1.0 + 3.0 * (boxes[..., 2] * boxes[..., 3]).sqrt()


def pad_targets(targets: Sequence[Mapping[str, Tensor]], device: torch.device) -> TargetGroups:
    """Gather the images' objects into one padded group per image, on ``device``.

    Each target holds ``boxes`` [n, 4] (``cxcywh``, fractions of the content) and ``labels`` [n] int64. They are padded
    on the CPU, so that targets which are there reach a GPU in one piece.
    """
    counts = [int(target["boxes"].shape[0]) for target in targets]
    most = max(counts, default=0)
    boxes = torch.zeros(len(targets), most, 4)
    labels = torch.zeros(len(targets), most, dtype=torch.int64)
    for image, (target, count) in enumerate(zip(targets, counts, strict=True)):
        if target["labels"].shape != (count,) or target["boxes"].shape != (count, 4):
            raise ValueError(
                f"target {image}: boxes must be [n, 4] and labels [n], got "
                f"{tuple(target['boxes'].shape)} and {tuple(target['labels'].shape)}"
            )
        boxes[image, :count] = target["boxes"]
        labels[image, :count] = target["labels"]
    valid = torch.arange(most) < torch.tensor(counts, dtype=torch.int64).reshape(-1, 1)
    boxes, labels, valid = (to_device(part, device) for part in (boxes, labels, valid))
    return TargetGroups(boxes, labels, valid, object_area_factor(boxes))


def box_corners(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left, top, right and bottom, each [...], of ``cxcywh`` boxes [..., 4]."""
    x, y, width, height = boxes.unbind(-1)
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def iou_and_giou(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU of ``cxcywh`` boxes [..., 4] that broadcast against each other.

    Pairs of equal shape give one number each; ``first[:, :, None]`` and ``second[:, None]`` give every combination.
    Coordinate planes instead of a trailing axis of four keep the pairwise form compact and fast.
    """
    left_1, top_1, right_1, bottom_1 = box_corners(first)
    left_2, top_2, right_2, bottom_2 = box_corners(second)
    overlap_width = (torch.minimum(right_1, right_2) - torch.maximum(left_1, left_2)).clamp(min=0)
    overlap_height = (torch.minimum(bottom_1, bottom_2) - torch.maximum(top_1, top_2)).clamp(min=0)
    overlap = overlap_width * overlap_height
    union = (right_1 - left_1) * (bottom_1 - top_1) + (right_2 - left_2) * (bottom_2 - top_2) - overlap
    iou = overlap / union.clamp(min=SMALLEST_AREA)
    hull_width = torch.maximum(right_1, right_2) - torch.minimum(left_1, left_2)
    hull_height = torch.maximum(bottom_1, bottom_2) - torch.minimum(top_1, top_2)
    hull = (hull_width * hull_height).clamp(min=SMALLEST_AREA)
    return iou, iou - (hull - union) / hull


@torch.no_grad()
def matching_costs(logits: Tensor, boxes: Tensor, valid: Tensor | None, groups: TargetGroups) -> tuple[Tensor, Tensor]:
    """Cost of every (prediction, object) pair, and their IoU (specification section 7).

    ``logits`` [G, Q, C], ``boxes`` [G, Q, 4] ``cxcywh`` in the group's frame, ``valid`` [G, Q] bool (None: all).
    Returns (cost [G, Q, T], iou [G, Q, T]); a pair with padding on either side costs infinity.
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


def assign(costs: Sequence[Tensor]) -> list[Matches]:
    """Solve the groups of several cost tensors [G, Q, T], with one transfer to the CPU and one back for all of them.

    An infinite row or column is padding and stays out. A group with fewer predictions than objects leaves objects
    unmatched. Raises ValueError when a prediction is not a number.
    """
    if not costs:
        return []
    device = costs[0].device
    flat = torch.cat([cost.detach().flatten() for cost in costs]).cpu().numpy()
    if np.isnan(flat).any():
        raise ValueError("the predictions hold values that are not numbers; lower the learning rate or resume earlier")
    solved, start = [], 0
    for cost in costs:
        solved.append(_solve(flat[start : start + cost.numel()].reshape(cost.shape)))
        start += cost.numel()
    indices = to_device(torch.from_numpy(np.concatenate(solved, axis=1)), device)
    parts = indices.split([part.shape[1] for part in solved], dim=1)
    return [Matches(*part.unbind(0)) for part in parts]


def _solve(costs: np.ndarray) -> np.ndarray:
    """Indices [3, M] int64 (group, prediction, object) of the optimal assignment of each group in [G, Q, T]."""
    usable = np.isfinite(costs)
    rows, columns = usable.any(2), usable.any(1)
    parts = [np.empty((3, 0), dtype=np.int64)]
    for group in np.flatnonzero(columns.any(1)):
        row = np.flatnonzero(rows[group])
        column = np.flatnonzero(columns[group])
        query, target = linear_sum_assignment(costs[group][np.ix_(row, column)])
        parts.append(np.stack([np.full_like(query, group), row[query], column[target]]))
    return np.concatenate(parts, axis=1)
