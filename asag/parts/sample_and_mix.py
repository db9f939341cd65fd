"""The layer that gives a query what the image shows where it looks (AdaMixer, sections 3.2 and 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asag.ops import sampling_mixing
from asag.ops.sampling_mixing import POINT_UNIT


class SampleAndMix(nn.Module):
    """Sample the pyramid at points of each query and mix the samples adaptively: [B, N, C] -> [B, N, C].

    groups: shares of the channels that look elsewhere, at `points` places each, mixed to `mixed_points`; activation:
    one of :data:`asag.ops.sampling_mixing.ACTIVATIONS`; point_unit: pixels per unit of the boxes.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        points: int,
        mixed_points: int,
        activation: str = "gelu",
        point_unit: int = POINT_UNIT,
    ) -> None:
        super().__init__()
        self.groups, self.points, self.mixed_points = groups, points, mixed_points
        self.activation, self.point_unit = activation, point_unit
        parameters = groups * ((channels // groups) ** 2 + points * mixed_points)
        self.offsets = nn.Linear(channels, groups * points * 3)
        self.parameters_of_query = nn.Linear(channels, parameters)
        self.out_projection = nn.Linear(channels * mixed_points, channels)
        self.norm = nn.LayerNorm(channels)
        nn.init.zeros_(self.offsets.weight)
        offsets = torch.cat((torch.rand(groups * points, 2) - 0.5, torch.full((groups * points, 1), -1.0)), 1)
        self.offsets.bias.data.copy_(offsets.flatten())

    def sampling_points(self, queries: Tensor, boxes: Tensor, scale: Tensor) -> Tensor:
        """[B, N, C], boxes [B, N, 4] (`cxcywh`) and the logarithm of their scale [B, N, 1] -> [B, N, G, P, 3].

        A point is (x, y, z) in units of `point_unit` pixels: the centre plus shares of width and height, and the scale
        plus an offset.
        """
        offsets = self.offsets(queries).unflatten(-1, (self.groups, self.points, 3))
        box = boxes[:, :, None, None]
        centre = box[..., :2] + offsets[..., :2] * box[..., 2:]
        return torch.cat((centre, scale[:, :, None, None] + offsets[..., 2:]), dim=-1)

    def forward(self, features: list[Tensor], queries: Tensor, points: Tensor) -> Tensor:
        """features: P2..P5, each [B, C, H, W]; points: what :meth:`sampling_points` gives -> [B, N, C]."""
        parameters = self.parameters_of_query(queries)
        mixed = sampling_mixing(features, points, parameters, self.mixed_points, self.activation, self.point_unit)
        return self.norm(queries + self.out_projection(mixed))
