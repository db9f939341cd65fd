"""The detector: backbone, neck, anchors, proposals and one decoder layer with parallel heads."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from asag.adamixer import AdaMixerHead
from asag.anchors import AnchorGenerator, Anchors
from asag.backbone import ResNet
from asag.config import HEADS, DetectorConfig
from asag.proposals import DynamicProposals, Proposals, attention_allowed
from asag.sparse_rcnn import SparseRCNNHead


class HeadOutput(NamedTuple):
    """What one head says of N queries."""

    logits: Tensor
    """[B, N, classes]"""
    boxes: Tensor
    """[B, N, 4] `cxcywh` as fractions of the content."""


class Detector(nn.Module):
    """ASAG. Images are [B, 3, H, W], normalized RGB, zero-padded at the bottom and right; `sizes` [B, 2] holds the
    (height, width) in pixels of each image's content.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        size = config.size
        self.backbone = ResNet(config.backbone, size.backbone_width, config.train_batch_statistics)
        self.neck = FeaturePyramidNetwork(self.backbone.channels, size.channels)
        self.anchor_generator = AnchorGenerator(config)
        self.proposals = DynamicProposals(config)
        head = {"adamixer": AdaMixerHead, "sparse_rcnn": SparseRCNNHead}[config.decoder]
        self.heads = nn.ModuleDict({name: head(config) for name in HEADS})
        self.head_embedding = nn.Embedding(len(HEADS), size.channels)

    def choose(self, head: str | None = None, levels: str | None = None) -> None:
        """Deploy another head, or explore other levels; None keeps the choice. No tensor depends on either.

        Raises ValueError for a head or levels that do not exist.
        """
        config = dataclasses.replace(self.config, head=head or self.config.head, levels=levels or self.config.levels)
        self.config = self.anchor_generator.config = config

    def features(self, images: Tensor) -> list[Tensor]:
        """Images -> P2..P5, each [B, C, H/stride, W/stride]; in float32 where autocast made them less."""
        maps = self.backbone(images)
        pyramid = self.neck({f"P{level}": feature for level, feature in enumerate(maps, start=2)})
        return [feature.to(torch.promote_types(feature.dtype, torch.float32)) for feature in pyramid.values()]

    def run_head(
        self, name: str, features: list[Tensor], proposals: Proposals, allowed: Tensor, sizes: Tensor
    ) -> HeadOutput:
        """One of the parallel heads, `aux_0`, `aux_1`, `aux_2` or `main`.

        The proposals' boxes get no gradient from it.
        """
        fixed = proposals._replace(boxes=proposals.boxes.detach(), xyzr=proposals.xyzr.detach())
        queries = proposals.queries + self.head_embedding.weight[HEADS.index(name)]
        return HeadOutput(*self.heads[name](features, queries, fixed, allowed, sizes))

    def forward(
        self, images: Tensor, sizes: Tensor, capacity: tuple[int, int] | None = None
    ) -> tuple[HeadOutput, Anchors]:
        """The deployed head's output and the anchors behind it; `capacity` as in :class:`AnchorGenerator`."""
        features = self.features(images)
        anchors = self.anchor_generator(features, sizes, capacity)
        allowed = attention_allowed(anchors.valid)
        proposals = self.proposals(features, anchors.boxes, allowed, sizes)
        return self.run_head(self.config.head, features, proposals, allowed, sizes), anchors

    @torch.no_grad()
    def stages(self, images: Tensor, sizes: Tensor, capacity: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Every intermediate result by name, without gradient: what parity and pictures look at.

        `p6_anchors` [B, 1, k, 5], `p5_anchors` [B, 4, k, 5], and for each level that was explored `p4_anchors`
        [patches, k, 5], `p4_crop_xy` [patches, 2] (cells), `p4_image_index` [patches] (boxes after the sigmoid,
        confidence before it); `anchors` [B, N, 4] (`cxcywh`, pixels), `valid` [B, N]; `proposal_logits`,
        `proposal_boxes`, and `<head>_logits` [B, N, classes], `<head>_boxes` [B, N, 4] (`cxcywh`, fractions of the
        content) of every head there is; `overflow` [B] int32, the candidates that `capacity` (as in
        :class:`AnchorGenerator`) left unexplored.
        """
        sizes = sizes.to(images.device, torch.float32)
        features = self.features(images)
        anchors = self.anchor_generator(features, sizes, capacity)
        allowed = attention_allowed(anchors.valid)
        proposals = self.proposals(features, anchors.boxes, allowed, sizes)
        found = {"p6_anchors": anchors.fixed.p6, "p5_anchors": anchors.fixed.p5}
        for level, probed in anchors.probed.items():
            name = level.lower()
            found[f"{name}_anchors"] = probed.predictions[probed.valid]
            found[f"{name}_crop_xy"] = probed.corners[probed.valid]
            found[f"{name}_image_index"] = probed.valid.nonzero()[:, 0]
        found |= {"anchors": anchors.boxes, "valid": anchors.valid, "overflow": anchors.overflow}
        found |= {"proposal_logits": proposals.logits, "proposal_boxes": proposals.boxes}
        for name in self.heads:
            output = self.run_head(name, features, proposals, allowed, sizes)
            found |= {f"{name}_logits": output.logits, f"{name}_boxes": output.boxes}
        return found


def build_detector(config: DetectorConfig) -> Detector:
    """A detector with random weights, in evaluation mode."""
    return Detector(config).eval()
