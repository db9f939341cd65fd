"""Box arithmetic shared by the proposals and the heads.

`xyzr` describes a box by its centre, the binary logarithm of its scale and of its aspect ratio (after AdaMixer;
README, section 4): x, y in units of 4 pixels, `z = log2(w*h)/2`, `r = log2(h/w)/2`, with w and h in units of 4 pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asag.ops.sampling_mixing import POINT_UNIT

XYZR_UNIT = POINT_UNIT
"""Pixels per unit of `xyzr` coordinates."""


def encode_xyzr(boxes: Tensor) -> Tensor:
    """[..., 4] `cxcywh` in pixels -> [..., 4] `xyzr` (README, section 4)."""
    x, y, width, height = (boxes / XYZR_UNIT).unbind(-1)
    z = torch.log2(width * height + 1e-7) / 2
    r = torch.log2(height / (width + 1e-7) + 1e-7) / 2
    return torch.stack((x, y, z, r), dim=-1)


def decode_xyzr(xyzr: Tensor) -> Tensor:
    """[..., 4] `xyzr` -> [..., 4] `cxcywh` in units of 4 pixels: `(w, h) = 2^z * (2^-r, 2^r)`."""
    z, r = xyzr[..., 2:3], xyzr[..., 3:4]
    return torch.cat((xyzr[..., :2], torch.exp2(z - r), torch.exp2(z + r)), dim=-1)


def refine_xyzr(xyzr: Tensor, deltas: Tensor) -> Tensor:
    """Apply predicted deltas, both [..., 4]: `xy += d_xy * 2^z`, `(z, r) += (d_z, d_r)`."""
    centre = xyzr[..., :2] + deltas[..., :2] * torch.exp2(xyzr[..., 2:3])
    return torch.cat((centre, xyzr[..., 2:] + deltas[..., 2:]), dim=-1)


def intersection_over_foreground(boxes: Tensor) -> Tensor:
    """[B, N, 4] `xyxy` -> [B, N, N]: overlap of boxes i and j over the area of i (at least 1e-6)."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    overlap = (high - low).clamp(min=0).prod(dim=-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    return overlap / area.clamp(min=1e-6).unsqueeze(-1)


def position_embedding(xyzr: Tensor, channels: int) -> Tensor:
    """[..., 4] `xyzr` -> [..., channels]: interleaved sine and cosine of x/1000, y/1000, z and r (README, section 4).

    `channels` must be divisible by 8: each of the four coordinates gets a quarter, half sines, half cosines.
    """
    quarter = channels // 4
    exponent = torch.arange(0, quarter, 2, device=xyzr.device, dtype=xyzr.dtype) / quarter
    frequency = torch.exp(-math.log(10000.0) * exponent)
    scaled = torch.cat((xyzr[..., :2] * 1e-3, xyzr[..., 2:]), dim=-1)
    phase = scaled.unsqueeze(-1) * frequency
    return torch.stack((phase.sin(), phase.cos()), dim=-1).flatten(-3)
