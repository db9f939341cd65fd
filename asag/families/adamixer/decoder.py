"""A decoder stage (AdaMixer, section 3.4): attention among queries, sampling and mixing, feed-forward, branches."""

from __future__ import annotations

import math

from torch import Tensor, nn

from asag.families.adamixer.config import AdaMixerConfig
from asag.parts.layers import Branches, FeedForward, GeometryAttention
from asag.parts.sample_and_mix import SampleAndMix
from asag.parts.xyzr import refine_xyzr

ACTIVATION = "relu"
POINT_UNIT = 1
"""Pixels per unit of `xyzr` and of sampling points."""

FIRST_PROBABILITY = 0.01
"""Of every class before training (Lin et al., "Focal Loss", section 4.1)."""


class DecoderStage(nn.Module):
    """Queries and their boxes -> better ones; logits of classes on demand, since only the last stage's are used."""

    def __init__(self, config: AdaMixerConfig) -> None:
        super().__init__()
        size = config.size
        self.attention = GeometryAttention(size.channels, size.attention_heads)
        self.sample_and_mix = SampleAndMix(
            size.channels, size.sampling_groups, size.sampling_points, size.mixed_points, ACTIVATION, POINT_UNIT
        )
        self.feed_forward = FeedForward(size.channels, size.feed_forward, ACTIVATION)
        self.branches = Branches(size.channels, config.classes, 1, ACTIVATION, bias=True)
        self._initialize()

    def _initialize(self) -> None:
        """Matrices by Glorot's rule; a query looks into its own box, asks for the same of every image, and keeps it."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.uniform_(self.attention.tau, 0.0, 4.0)
        for weight in (self.sample_and_mix.offsets.weight, self.sample_and_mix.parameters_of_query.weight):
            nn.init.zeros_(weight)
        nn.init.zeros_(self.branches.box_deltas.weight)
        nn.init.constant_(self.branches.class_logits.bias, -math.log(1 / FIRST_PROBABILITY - 1))

    def points(self, attended: Tensor, xyzr: Tensor, boxes: Tensor) -> Tensor:
        """Where queries look after attention: [B, N, G, P, 3], x, y and 2^z in pixels of the input."""
        return self.sample_and_mix.sampling_points(attended, boxes, xyzr[..., 2:3])

    def refine(self, features: list[Tensor], attended: Tensor, points: Tensor, xyzr: Tensor) -> tuple[Tensor, Tensor]:
        """What follows attention, of every query alone: queries and xyzr of the next stage."""
        queries = self.feed_forward(self.sample_and_mix(features, attended, points))
        return queries, refine_xyzr(xyzr, self.branches.deltas(queries))

    def forward(self, features: list[Tensor], queries: Tensor, xyzr: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """features: P2..P5, each [B, C, H, W]; queries: [B, N, C]; xyzr: [B, N, 4], pixels of the input; boxes: the
        same as `cxcywh` -> queries and xyzr of the next stage.
        """
        attended = self.attention(queries, xyzr, boxes)
        return self.refine(features, attended, self.points(attended, xyzr, boxes), xyzr)
