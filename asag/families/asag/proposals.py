"""Dynamic proposals: each anchor's features become a query and a refined box (README, section 4)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from asag.detector import stage
from asag.families.asag.config import ASAGConfig
from asag.families.asag.geometry import XYZR_UNIT, decode_xyzr, encode_xyzr
from asag.families.asag.pyramid import Pyramid
from asag.ops.pyramid_roi_align import ROI_SIDE
from asag.parts.boxes import content_scale
from asag.parts.layers import Branches, FeedForward, GeometryAttention
from asag.parts.xyzr import refine_xyzr


class Proposals(NamedTuple):
    """What the decoder starts from."""

    queries: Tensor
    """[B, N, C]"""
    logits: Tensor
    """[B, N, classes]"""
    boxes: Tensor
    """[B, N, 4] `cxcywh` as fractions of the content."""
    xyzr: Tensor
    """[B, N, 4] the same boxes as `xyzr`."""


def normalized_boxes(xyzr: Tensor, sizes: Tensor) -> Tensor:
    """[B, N, 4] `xyzr` -> `cxcywh` as fractions of each image's own content; sizes: [B, 2] (height, width) pixels."""
    return decode_xyzr(xyzr) * XYZR_UNIT / content_scale(sizes)


class DynamicProposals(nn.Module):
    """Maps and anchors -> :class:`Proposals`."""

    def __init__(self, config: ASAGConfig) -> None:
        super().__init__()
        size = config.size
        self.roi_projection = nn.Linear(size.channels * ROI_SIDE**2, size.channels)
        self.roi_norm = nn.LayerNorm(size.channels)
        self.attention = GeometryAttention(size.channels, size.attention_heads)
        self.feed_forward = FeedForward(size.channels, size.feed_forward)
        self.branches = Branches(size.channels, config.classes)

    def forward(self, pyramid: Pyramid, anchors: Tensor, allowed: Tensor, sizes: Tensor) -> Proposals:
        """anchors: [B, N, 4] `cxcywh` in pixels; allowed: [B, 1, N or 1, N] bool attention mask; sizes: [B, 2]."""
        rois = pyramid.rois(anchors)
        queries = self.roi_norm(self.roi_projection(rois.flatten(2)))
        xyzr = encode_xyzr(anchors)
        queries = self.feed_forward(self.attention(queries, xyzr, decode_xyzr(xyzr), allowed))
        logits, deltas = self.branches(queries)
        xyzr = refine_xyzr(xyzr, deltas)
        queries, logits, boxes, xyzr = stage(
            "proposals", queries=queries, logits=logits, boxes=normalized_boxes(xyzr, sizes), xyzr=xyzr
        )
        return Proposals(queries, logits, boxes, xyzr)


def attention_allowed(valid: Tensor) -> Tensor:
    """valid [B, N] bool -> [B, 1, 1, N]: padding queries are never attended to."""
    return valid[:, None, None, :]
