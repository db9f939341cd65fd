"""What the decoder looks at: the target of the token scorer (Sparse DETR, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from asag.parts.deformable_attention import Sampling
from asag.parts.levels import LevelShapes


@torch.no_grad()
def decoder_attention_map(samplings: Sequence[Sampling], shapes: LevelShapes) -> Tensor:
    """[B, T], for every token all attention weights of all layers, queries, heads and points that fall on it.

    A weight is spread over the four cells around its place as if a cell's number were its centre: the published
    training counts half a cell less than the attention itself does. Cells outside the map get nothing.
    """
    locations = torch.stack([each.locations for each in samplings], dim=1)
    weights = torch.stack([each.weights for each in samplings], dim=1)
    points = weights.shape[-1] // len(shapes)
    parts = []
    for level, (height, width) in enumerate(shapes):
        chosen = slice(level * points, (level + 1) * points)
        place = (locations[..., chosen, :] * locations.new_tensor((width, height))).flatten(1, -2)
        parts.append(_spread(place, weights[..., chosen].flatten(1), height, width))
    return torch.cat(parts, dim=1)


def _spread(places: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
    """places: [B, P, 2] (x, y) in cells; weights: [B, P] -> [B, height * width]."""
    total = weights.new_zeros((weights.shape[0], height * width))
    first = places.floor()
    part = places - first
    for right in (0, 1):
        for down in (0, 1):
            x, y = first[..., 0] + right, first[..., 1] + down
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            share = (part[..., 0] if right else 1 - part[..., 0]) * (part[..., 1] if down else 1 - part[..., 1])
            cell = (y * width + x).long().where(inside, 0)
            total = total.scatter_add(1, cell, torch.where(inside, weights * share, 0.0))
    return total


def wanted_tokens(attention_map: Tensor, padded: Tensor, counts: Tensor, most: int) -> Tensor:
    """[B, T] float, 1 for each image's `counts` [B] tokens with content that the decoder looks at most, 0 for others.

    most: at least every count.
    """
    order = attention_map.masked_fill(padded, -torch.inf).topk(most, dim=1).indices
    within = torch.arange(most, device=order.device) < counts.unsqueeze(1)
    return torch.zeros_like(attention_map).scatter(1, order, within.float())


@torch.no_grad()
def kept_shares(attention_map: Tensor, kept: Tensor, shapes: LevelShapes) -> Tensor:
    """[B, 1 + L], how much of what the decoder looks at are kept tokens: of all levels, then of each (section 4.3).

    kept: [B, K], places of tokens.
    """
    found = torch.zeros_like(attention_map).scatter(1, kept, attention_map.gather(1, kept))
    sizes = [height * width for height, width in shapes]
    parts = [torch.stack([part.sum(1) for part in each.split(sizes, 1)], 1) for each in (found, attention_map)]
    of_kept, of_all = (torch.cat((part.sum(1, keepdim=True), part), 1) for part in parts)
    return of_kept / of_all.clamp(min=torch.finfo(of_all.dtype).tiny)
