"""The AdaMixer head of ASAG-A (README of the family, section 5)."""

from __future__ import annotations

from torch import Tensor, nn

from asag.detector import stage
from asag.families.asag.config import ASAGConfig
from asag.families.asag.geometry import decode_xyzr
from asag.families.asag.proposals import Proposals, normalized_boxes
from asag.families.asag.pyramid import Pyramid
from asag.parts.layers import Branches, FeedForward, GeometryAttention
from asag.parts.sample_and_mix import SampleAndMix
from asag.parts.xyzr import refine_xyzr


class AdaMixerHead(nn.Module):
    """Proposals -> class logits [B, N, classes] and boxes [B, N, 4] (`cxcywh`, fractions of the content)."""

    def __init__(self, config: ASAGConfig) -> None:
        super().__init__()
        size = config.size
        self.attention = GeometryAttention(size.channels, size.attention_heads)
        self.sample_and_mix = SampleAndMix(size.channels, size.sampling_groups, size.sampling_points, size.mixed_points)
        self.feed_forward = FeedForward(size.channels, size.feed_forward)
        self.branches = Branches(size.channels, config.classes)

    def forward(
        self, pyramid: Pyramid, queries: Tensor, proposals: Proposals, allowed: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """queries: [B, N, C], the proposals' plus this head's embedding; allowed: attention mask; sizes: [B, 2]."""
        xyzr = proposals.xyzr
        boxes = decode_xyzr(xyzr)
        queries = self.attention(queries, xyzr, boxes, allowed)
        (points,) = stage("head", points=self.sample_and_mix.sampling_points(queries, boxes, xyzr[..., 2:3]))
        queries = self.feed_forward(self.sample_and_mix(pyramid.maps, queries, points))
        logits, deltas = self.branches(queries)
        return logits, normalized_boxes(refine_xyzr(xyzr, deltas), sizes)
