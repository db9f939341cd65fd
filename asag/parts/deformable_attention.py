"""Attention to few places on the maps, which the query itself chooses (Deformable DETR, ICLR 2021, section 4.1)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asag.ops import multi_scale_deformable_attention
from asag.parts.levels import Levels


class Sampling(NamedTuple):
    """Where queries look, and how much each place counts; P places on each of L levels."""

    locations: Tensor
    """[B, N, heads, L * P, 2] (x, y), fractions of the padded maps."""
    weights: Tensor
    """[B, N, heads, L * P], of a head they add up to one."""


class DeformableAttention(nn.Module):
    """Queries [B, N, C] gather from the tokens of L levels, one after another, [B, T, C] -> [B, N, C]."""

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(channels, heads * levels * points * 2)
        self.weights = nn.Linear(channels, heads * levels * points)
        self.value_projection = nn.Linear(channels, channels)
        self.output_projection = nn.Linear(channels, channels)
        self.initialize()

    def initialize(self) -> None:
        """A head looks in a direction of its own, its points one cell further each, and all of them count alike."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        reach = direction[:, None, None] * torch.arange(1, self.points + 1)[:, None]
        nn.init.zeros_(self.offsets.weight)
        self.offsets.bias.data.copy_(reach.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for projection in (self.value_projection, self.output_projection):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def sampling(self, queries: Tensor, references: Tensor, levels: Levels) -> Sampling:
        """references: [B, N, 2 or 4], points or `cxcywh` boxes as fractions of the content.

        Offsets are cells around a point, and shares of half a box over the number of points (section A.4).
        """
        offsets = self.offsets(queries).unflatten(-1, (self.heads, self.levels, self.points, 2))
        weights = self.weights(queries).unflatten(-1, (self.heads, self.levels * self.points)).softmax(-1)
        places = levels.on_maps(references)[:, :, None, :, None]
        if references.shape[-1] == 2:
            locations = places + offsets / levels.cells[:, None]
        else:
            locations = places[..., :2] + offsets / self.points * places[..., 2:] * 0.5
        return Sampling(locations.flatten(3, 4), weights)

    def forward(self, queries: Tensor, references: Tensor, memory: Tensor, levels: Levels) -> tuple[Tensor, Sampling]:
        """memory: [B, T, C], the tokens of `levels`, of which those of the padding give nothing; the others as in
        :meth:`sampling`.
        """
        sampling = self.sampling(queries, references, levels)
        return self.gather(sampling, memory, levels), sampling

    def gather(self, sampling: Sampling, memory: Tensor, levels: Levels) -> Tensor:
        """What the memory [B, T, C] has where the queries look, [B, N, C]."""
        values = self.value_projection(memory).masked_fill(levels.padded.unsqueeze(-1), 0.0)
        values = values.unflatten(-1, (self.heads, -1))
        points = (self.points,) * self.levels
        found = multi_scale_deformable_attention(values, *sampling, levels.shapes, points)
        return self.output_projection(found)
