"""MultiScaleDeformableAttention: each query's weighted samples of all levels, head by head.

Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def deformable_attention_definition(
    value: Tensor, locations: Tensor, weights: Tensor, level_shapes: Sequence[int], level_points: Sequence[int]
) -> Tensor:
    """The sum of a head's bilinear samples, each times its weight; heads one after another.

    value: [B, S, M, D], the cells of all levels row by row, of M heads; locations: [B, Q, M, N, 2] (x, y) as fractions
    of a level's map, 0 the outer edge of its first cell, 1 that of its last; weights: [B, Q, M, N]; level_shapes:
    height and width of each level, S cells in all; level_points: a head's points on each level, N in all, the levels
    one after another -> [B, Q, M*D]. Cells outside a map are zeros, and so is what a place that is no number samples.
    Samples are taken and summed in the type of the locations; the result has the type of `value`. Raises ValueError
    where the levels do not fit the tensors.
    """
    check_levels(value.shape[1], locations.shape[3], level_shapes, level_points)
    batch, heads = value.shape[0], value.shape[2]
    cells = [height * width for height, width in zip(level_shapes[::2], level_shapes[1::2], strict=True)]
    # Beyond these bounds lies nothing of any map.
    places = (2 * locations.clamp(-1, 2).nan_to_num(-1) - 1).transpose(1, 2).flatten(0, 1)
    shares = weights.to(locations.dtype).transpose(1, 2).flatten(0, 1).unsqueeze(1)
    total = locations.new_zeros(())
    points = list(level_points)
    levels = zip(value.split(cells, 1), places.split(points, 2), shares.split(points, 3), strict=True)
    for level, (rows, grid, share) in enumerate(levels):
        maps = rows.to(locations.dtype).permute(0, 2, 3, 1).flatten(0, 1)
        maps = maps.unflatten(-1, tuple(level_shapes[2 * level : 2 * level + 2]))
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        total = total + (sampled * share).sum(-1)
    return total.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype).contiguous()


def check_levels(cells: int, points: int, level_shapes: Sequence[int], level_points: Sequence[int]) -> None:
    """Raise ValueError unless the levels have `cells` cells and `points` points together, each at least one."""
    found = sum(height * width for height, width in zip(level_shapes[::2], level_shapes[1::2], strict=False))
    fits = len(level_shapes) == 2 * len(level_points) and (found, sum(level_points)) == (cells, points)
    if not fits or min(*level_shapes, *level_points) < 1:
        raise ValueError(
            f"levels of {list(level_shapes)} cells (height, width) with {list(level_points)} points do not fit "
            f"{cells} cells and {points} points"
        )


@torch.library.custom_op("asag::deformable_attention", mutates_args=())
def _deformable_attention(
    value: Tensor, locations: Tensor, weights: Tensor, level_shapes: Sequence[int], level_points: Sequence[int]
) -> Tensor:
    return deformable_attention_definition(value, locations, weights, level_shapes, level_points)


@_deformable_attention.register_fake
def _(
    value: Tensor, locations: Tensor, weights: Tensor, level_shapes: Sequence[int], level_points: Sequence[int]
) -> Tensor:
    return value.new_empty((*locations.shape[:2], value.shape[2] * value.shape[3]))


def multi_scale_deformable_attention(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    level_shapes: Sequence[tuple[int, int]],
    level_points: Sequence[int],
) -> Tensor:
    """:func:`deformable_attention_definition`, as one op where no gradient is needed.

    level_shapes: (height, width) of each level.
    """
    sides = [side for shape in level_shapes for side in shape]
    if torch.is_grad_enabled() and (value.requires_grad or locations.requires_grad or weights.requires_grad):
        return deformable_attention_definition(value, locations, weights, sides, level_points)
    return torch.ops.asag.deformable_attention(value, locations, weights, sides, list(level_points))
