"""Boxes as `xyzr`: centre, binary logarithm of the scale, logarithm of the aspect (AdaMixer, section 3.2).

What `r` is exactly, and in which unit x, y and 2^z are, each family says; nothing here depends on it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def refine_xyzr(xyzr: Tensor, deltas: Tensor) -> Tensor:
    """Apply predicted deltas, both [..., 4]: `xy += d_xy * 2^z`, `(z, r) += (d_z, d_r)`."""
    centre = xyzr[..., :2] + deltas[..., :2] * torch.exp2(xyzr[..., 2:3])
    return torch.cat((centre, xyzr[..., 2:] + deltas[..., 2:]), dim=-1)


def position_embedding(xyzr: Tensor, channels: int) -> Tensor:
    """[..., 4] `xyzr` -> [..., channels]: interleaved sine and cosine of x/1000, y/1000, z and r.

    `channels` must be divisible by 8: each of the four coordinates gets a quarter, half sines, half cosines.
    """
    quarter = channels // 4
    exponent = torch.arange(0, quarter, 2, device=xyzr.device, dtype=xyzr.dtype) / quarter
    frequency = torch.exp(-math.log(10000.0) * exponent)
    scaled = torch.cat((xyzr[..., :2] * 1e-3, xyzr[..., 2:]), dim=-1)
    phase = scaled.unsqueeze(-1) * frequency
    return torch.stack((phase.sin(), phase.cos()), dim=-1).flatten(-3)
