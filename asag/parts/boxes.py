"""Box arithmetic that every family needs."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre-size to corner boxes, [..., 4] in any unit."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def content_scale(sizes: Tensor) -> Tensor:
    """Content sizes [B, 2] (height, width) -> [B, 1, 4] (w, h, w, h), to scale normalized boxes to pixels."""
    return sizes.flip(-1).repeat(1, 2).unsqueeze(1)
