"""Where content lies on padded maps, and sine embeddings of places.

Everything follows from the content's sizes by comparisons with constants of the map's shape, so shapes are static.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def content_cells(sizes: Tensor, input_size: tuple[int, int], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which rows [B, h] and columns [B, w] of a map of `shape` show content, bool.

    sizes: [B, 2] (height, width) of the contents in pixels of the padded input, `input_size` (height, width). The mask
    of padding is resized to the map by taking the nearest pixel towards the origin, as the published detectors do.
    """
    found = []
    for axis in (0, 1):
        cell = torch.arange(shape[axis], device=sizes.device, dtype=torch.float32)
        pixel = (cell * (input_size[axis] / shape[axis])).floor()
        found.append(pixel < sizes[:, axis : axis + 1])
    return found[0], found[1]


def sine_embedding(angles: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """[...] -> [..., channels]: interleaved sine and cosine of `angle / temperature^(2k/channels)`, for k from 0 to
    channels/2 - 1 (Vaswani et al., "Attention Is All You Need", section 3.5).
    """
    exponent = torch.arange(0, channels, 2, device=angles.device, dtype=angles.dtype) / channels
    phase = angles.unsqueeze(-1) / temperature**exponent
    return torch.stack((phase.sin(), phase.cos()), dim=-1).flatten(-2)


def map_embedding(rows: Tensor, columns: Tensor, channels: int) -> Tensor:
    """Sine embedding of every cell of a map, [B, h, w, channels]: its y in the first half, its x in the second.

    rows [B, h] and columns [B, w] bool, as :func:`content_cells` gives them. A turn of 2 pi spans the content, and the
    centre of a cell counts (Carion et al., "End-to-End Object Detection with Transformers", appendix A.4, and
    Deformable DETR's half cell). Cells of the padding get the place of the last cell with content.
    """
    y, x = (sine_embedding(_angles(cells), channels // 2) for cells in (rows, columns))
    y, x = y.unsqueeze(2), x.unsqueeze(1)
    return torch.cat((y.expand(-1, -1, x.shape[2], -1), x.expand(-1, y.shape[1], -1, -1)), dim=-1)


def _angles(cells: Tensor) -> Tensor:
    """[B, n] bool -> [B, n] radians."""
    count = cells.sum(1, keepdim=True).float()
    number = torch.arange(1, cells.shape[1] + 1, device=cells.device)
    return (torch.minimum(number, count) - 0.5) / (count + 1e-6) * (2 * math.pi)
