"""The Sparse R-CNN head of ASAG-S (README of the family, section 5; Sun et al., "Sparse R-CNN", section 3.3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag.families.asag.config import ASAGConfig
from asag.families.asag.proposals import Proposals
from asag.families.asag.pyramid import Pyramid
from asag.ops.pyramid_roi_align import ROI_SIDE
from asag.parts.boxes import content_scale
from asag.parts.layers import Branches, FeedForward, SelfAttention, exclude

CENTRE_WEIGHT = 2.0
"""Deltas of the centre are divided by this; those of the size by one."""
LARGEST_LOG_SIZE = math.log(100000.0 / 16)


class DynamicConvolution(nn.Module):
    """Each query filters its own box's features: [B, N, C] and [B, N, C, 7, 7] -> [B, N, C]."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.inner = inner
        self.parameters_of_query = nn.Linear(channels, 2 * channels * inner)
        self.inner_norm = nn.LayerNorm(inner)
        self.outer_norm = nn.LayerNorm(channels)
        self.out_projection = nn.Linear(channels * ROI_SIDE**2, channels)
        self.out_norm = nn.LayerNorm(channels)

    def forward(self, queries: Tensor, rois: Tensor) -> Tensor:
        """queries: [B, N, C]; rois: [B, N, C, 7, 7] -> [B, N, C]."""
        channels = queries.shape[-1]
        first, second = self.parameters_of_query(queries).chunk(2, dim=-1)
        x = rois.flatten(3).transpose(2, 3)
        x = F.relu(self.inner_norm(x @ first.unflatten(-1, (channels, self.inner))))
        x = F.relu(self.outer_norm(x @ second.unflatten(-1, (self.inner, channels))))
        return F.relu(self.out_norm(self.out_projection(x.flatten(2))))


class SparseRCNNHead(nn.Module):
    """Proposals -> class logits [B, N, classes] and boxes [B, N, 4] (`cxcywh`, fractions of the content)."""

    def __init__(self, config: ASAGConfig) -> None:
        super().__init__()
        size = config.size
        self.attention = SelfAttention(size.channels, size.attention_heads)
        self.attention_norm = nn.LayerNorm(size.channels)
        self.dynamic_convolution = DynamicConvolution(size.channels, size.dynamic_channels)
        self.convolution_norm = nn.LayerNorm(size.channels)
        self.feed_forward = FeedForward(size.channels, size.feed_forward)
        self.branches = Branches(size.channels, config.classes)

    def forward(
        self, pyramid: Pyramid, queries: Tensor, proposals: Proposals, allowed: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """queries: [B, N, C], the proposals' plus this head's embedding; allowed: attention mask; sizes: [B, 2]."""
        rois = pyramid.rois(proposals.boxes * content_scale(sizes))
        nothing = torch.zeros((1, 1, 1, 1), device=queries.device)
        queries = self.attention_norm(queries + self.attention(queries, exclude(nothing, allowed)))
        queries = self.convolution_norm(queries + self.dynamic_convolution(queries, rois))
        logits, deltas = self.branches(self.feed_forward(queries))
        return logits, apply_deltas(proposals.boxes, deltas)


def apply_deltas(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Both [..., 4]; boxes `cxcywh`: `c += d*size`, `size *= exp(min(d, log(100000/16)))`, deltas over (2, 2, 1, 1)."""
    centre = boxes[..., :2] + deltas[..., :2] / CENTRE_WEIGHT * boxes[..., 2:]
    return torch.cat((centre, boxes[..., 2:] * deltas[..., 2:].clamp(max=LARGEST_LOG_SIZE).exp()), dim=-1)
