"""Boxes as `xyzr` in the unit that the proposals and the heads work in.

`xyzr` describes a box by its centre, the binary logarithm of its scale and of its aspect ratio (after AdaMixer;
README, section 4): x, y in units of 4 pixels, `z = log2(w*h)/2`, `r = log2(h/w)/2`, with w and h in units of 4 pixels.
"""

from __future__ import annotations

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
