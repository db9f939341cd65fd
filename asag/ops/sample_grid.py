"""SampleGrid: maps read at places of a grid, as `torch.nn.functional.grid_sample` does bilinearly.

It stands where a detector of another tool samples and is not deformable attention as a whole: TensorRT miscompiles
GridSample in several releases.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PADDINGS = ("zeros", "border")
"""What lies around a map, by the number that the op has for it: zeros, or the cell of the border that is nearest."""


def sample_grid_definition(value: Tensor, grid: Tensor, padding: int, align_corners: int) -> Tensor:
    """Bilinear samples of maps, each channel by itself.

    value: [B, C, H, W]; grid: [B, R, K, 2] (x, y), where -1 and 1 are the outer edges of the first and the last cell,
    or with `align_corners` their centres; padding: a place in :data:`PADDINGS` -> [B, C, R, K], in the type of `value`.
    What is no number counts as far left or far above. Samples are taken in the type of the grid.
    """
    # Beyond three half maps from the centre lies nothing of any map.
    places = grid.clamp(-3, 3).nan_to_num(-3)
    maps = value.to(grid.dtype)
    sampled = F.grid_sample(maps, places, "bilinear", PADDINGS[padding], align_corners=bool(align_corners))
    return sampled.to(value.dtype).contiguous()


@torch.library.custom_op("asag::sample_grid", mutates_args=())
def _sample_grid(value: Tensor, grid: Tensor, padding: int, align_corners: int) -> Tensor:
    return sample_grid_definition(value, grid, padding, align_corners)


@_sample_grid.register_fake
def _(value: Tensor, grid: Tensor, padding: int, align_corners: int) -> Tensor:
    return value.new_empty((*value.shape[:2], *grid.shape[1:3]))


def sample_grid(value: Tensor, grid: Tensor, padding: int = 0, align_corners: int = 0) -> Tensor:
    """:func:`sample_grid_definition`, as one op where no gradient is needed."""
    if torch.is_grad_enabled() and (value.requires_grad or grid.requires_grad):
        return sample_grid_definition(value, grid, padding, align_corners)
    return torch.ops.asag.sample_grid(value, grid, padding, align_corners)
