"""Boxes as `xyzr` in pixels of the input (AdaMixer, section 3.2).

x, y: the centre; `z = log2(sqrt(w*h))`; `r = log2(h/w)`. Both logarithms are of the bare numbers: a box has area.
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode_xyzr(boxes: Tensor) -> Tensor:
    """[..., 4] `cxcywh` in pixels -> [..., 4] `xyzr`."""
    x, y, width, height = boxes.unbind(-1)
    return torch.stack((x, y, torch.log2((width * height).sqrt()), torch.log2(height / width)), dim=-1)


def decode_xyzr(xyzr: Tensor) -> Tensor:
    """[..., 4] `xyzr` -> [..., 4] `cxcywh` in pixels: `(w, h) = 2^z * (2^(-r/2), 2^(r/2))`."""
    z, half = xyzr[..., 2:3], xyzr[..., 3:4] / 2
    return torch.cat((xyzr[..., :2], torch.exp2(z - half), torch.exp2(z + half)), dim=-1)
