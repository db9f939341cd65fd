"""The AdaMixer head of ASAG-A (README of the family, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asag.families.asag.config import ASAGConfig
from asag.families.asag.geometry import decode_xyzr, refine_xyzr
from asag.families.asag.layers import Branches, FeedForward, GeometryAttention
from asag.families.asag.proposals import Proposals, normalized_boxes
from asag.ops import sampling_mixing


class SampleAndMix(nn.Module):
    """Sample the pyramid at points of each query and mix the samples adaptively: [B, N, C] -> [B, N, C]."""

    def __init__(self, config: ASAGConfig) -> None:
        super().__init__()
        size = config.size
        self.groups, self.points, self.mixed_points = size.sampling_groups, size.sampling_points, size.mixed_points
        group_channels = size.channels // self.groups
        parameters = self.groups * (group_channels**2 + self.points * self.mixed_points)
        self.offsets = nn.Linear(size.channels, self.groups * self.points * 3)
        self.parameters_of_query = nn.Linear(size.channels, parameters)
        self.out_projection = nn.Linear(size.channels * self.mixed_points, size.channels)
        self.norm = nn.LayerNorm(size.channels)
        nn.init.zeros_(self.offsets.weight)
        offsets = torch.cat(
            (torch.rand(self.groups * self.points, 2) - 0.5, torch.full((self.groups * self.points, 1), -1.0)), 1
        )
        self.offsets.bias.data.copy_(offsets.flatten())

    def sampling_points(self, queries: Tensor, xyzr: Tensor) -> Tensor:
        """[B, N, C], [B, N, 4] -> [B, N, G, P, 3]: x, y in units of 4 pixels and z in pyramid levels."""
        offsets = self.offsets(queries).unflatten(-1, (self.groups, self.points, 3))
        box = decode_xyzr(xyzr)[:, :, None, None]
        centre = box[..., :2] + offsets[..., :2] * box[..., 2:]
        return torch.cat((centre, xyzr[:, :, None, None, 2:3] + offsets[..., 2:]), dim=-1)

    def forward(self, features: list[Tensor], queries: Tensor, xyzr: Tensor) -> Tensor:
        """features: P2..P5, each [B, C, H, W]; queries: [B, N, C]; xyzr: [B, N, 4] -> [B, N, C]."""
        points = self.sampling_points(queries, xyzr)
        mixed = sampling_mixing(features, points, self.parameters_of_query(queries), self.mixed_points)
        return self.norm(queries + self.out_projection(mixed))


class AdaMixerHead(nn.Module):
    """Proposals -> class logits [B, N, classes] and boxes [B, N, 4] (`cxcywh`, fractions of the content)."""

    def __init__(self, config: ASAGConfig) -> None:
        super().__init__()
        size = config.size
        self.attention = GeometryAttention(size.channels, size.attention_heads)
        self.sample_and_mix = SampleAndMix(config)
        self.feed_forward = FeedForward(size.channels, size.feed_forward)
        self.branches = Branches(size.channels, config.classes)

    def forward(
        self, features: list[Tensor], queries: Tensor, proposals: Proposals, allowed: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """queries: [B, N, C], the proposals' plus this head's embedding; allowed: attention mask; sizes: [B, 2]."""
        xyzr = proposals.xyzr
        queries = self.attention(queries, xyzr, allowed)
        queries = self.feed_forward(self.sample_and_mix(features, queries, xyzr))
        logits, deltas = self.branches(queries)
        return logits, normalized_boxes(refine_xyzr(xyzr, deltas), sizes)
