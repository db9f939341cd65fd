"""How well boxes lie on one another."""

from __future__ import annotations

import torch
from torch import Tensor

from asag.parts.boxes import cxcywh_to_xyxy

# Far below the area of any real box or union of boxes: only keeps 0/0 out.
SMALLEST_AREA = 1e-12


def iou_and_giou(first: Tensor, second: Tensor, added: float = 0.0) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU (Rezatofighi et al., CVPR 2019) of `cxcywh` boxes [..., 4] that broadcast.

    Pairs of equal shape give one number each; `first[:, :, None]` and `second[:, None]` give every combination of
    every group, which torchvision's functions do for a single group only. They have no gradient for boxes without
    area, either. Coordinate planes instead of a trailing axis of four keep the pairwise form compact and fast.

    added: what some methods add to the areas that are divided by.
    """
    left_1, top_1, right_1, bottom_1 = cxcywh_to_xyxy(first).unbind(-1)
    left_2, top_2, right_2, bottom_2 = cxcywh_to_xyxy(second).unbind(-1)
    overlap_width = (torch.minimum(right_1, right_2) - torch.maximum(left_1, left_2)).clamp(min=0)
    overlap_height = (torch.minimum(bottom_1, bottom_2) - torch.maximum(top_1, top_2)).clamp(min=0)
    overlap = overlap_width * overlap_height
    union = (right_1 - left_1) * (bottom_1 - top_1) + (right_2 - left_2) * (bottom_2 - top_2) - overlap
    iou = overlap / (union.clamp(min=SMALLEST_AREA) + added)
    hull_width = torch.maximum(right_1, right_2) - torch.minimum(left_1, left_2)
    hull_height = torch.maximum(bottom_1, bottom_2) - torch.minimum(top_1, top_2)
    hull = (hull_width * hull_height).clamp(min=SMALLEST_AREA)
    return iou, iou - (hull - union) / (hull + added)
