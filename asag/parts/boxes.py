"""Box arithmetic that every family needs."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre-size to corner boxes, [..., 4] in any unit."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Corner to centre-size boxes, [..., 4] in any unit."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def inverse_sigmoid(fractions: Tensor, least: float = 1e-5) -> Tensor:
    """The logits of fractions in 0..1, which and whose complements count as `least` at least."""
    return (fractions.clamp(min=least) / (1 - fractions).clamp(min=least)).log()


def content_scale(sizes: Tensor) -> Tensor:
    """Content sizes [B, 2] (height, width) -> [B, 1, 4] (w, h, w, h), to scale normalized boxes to pixels."""
    return sizes.flip(-1).repeat(1, 2).unsqueeze(1)


def intersection_over_foreground(boxes: Tensor) -> Tensor:
    """[B, N, 4] `xyxy` -> [B, N, N]: overlap of boxes i and j over the area of i (at least 1e-6)."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    overlap = (high - low).clamp(min=0).prod(dim=-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    return overlap / area.clamp(min=1e-6).unsqueeze(-1)
