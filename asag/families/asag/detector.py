"""The detector: backbone, neck, anchors, proposals and one decoder layer with parallel heads."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from asag.detector import Detector, Predictions, stage
from asag.families.asag.anchors import AnchorGenerator
from asag.families.asag.config import HEADS, ASAGConfig
from asag.families.asag.encoder import Encoder, NormedPyramid
from asag.families.asag.heads.adamixer import AdaMixerHead
from asag.families.asag.heads.deformable import DeformableHead
from asag.families.asag.heads.sparse_rcnn import SparseRCNNHead
from asag.families.asag.proposals import DynamicProposals, Proposals, attention_allowed
from asag.families.asag.pyramid import Pyramid
from asag.parts.backbones.resnet import ResNet
from asag.parts.levels import levels_of


class HeadOutput(NamedTuple):
    """What one head says of N queries."""

    logits: Tensor
    """[B, N, classes]"""
    boxes: Tensor
    """[B, N, 4] `cxcywh` as fractions of the content."""


class ASAGDetector(Detector):
    """ASAG; inputs as in :class:`asag.detector.Detector`. All four heads are trained, `config.head` is deployed.

    Patches take as many places as the fullest image needs; a deployed copy has `config.patch_capacity` of them.
    """

    config: ASAGConfig

    def __init__(self, config: ASAGConfig) -> None:
        super().__init__()
        self.config = config
        size = config.size
        self.backbone = ResNet(config.backbone, size.backbone_width, config.train_batch_statistics)
        self.neck: nn.Module
        if config.encoded:
            self.neck = NormedPyramid(self.backbone.channels[-3:], size.channels, size.norm_groups)
            self.encoder = Encoder(config)
        else:
            self.neck = FeaturePyramidNetwork(self.backbone.channels, size.channels)
        self.anchor_generator = AnchorGenerator(config)
        self.proposals = DynamicProposals(config)
        heads = {"adamixer": AdaMixerHead, "sparse_rcnn": SparseRCNNHead, "deformable": DeformableHead}
        head = heads[config.decoder]
        self.heads = nn.ModuleDict({name: head(config) for name in HEADS})
        self.head_embedding = nn.Embedding(len(HEADS), size.channels)
        self.capacity: tuple[int, int] | None = None

    def features(self, images: Tensor) -> list[Tensor]:
        """Images -> P2..P5, or P3..P6 where an encoder follows, each [B, C, H/stride, W/stride]; in float32 where
        autocast made them less.
        """
        first = self.config.first_level
        maps = self.backbone(images)[first - 2 :]
        pyramid = self.neck({f"P{level}": feature for level, feature in enumerate(maps, start=first)})
        return [feature.to(torch.promote_types(feature.dtype, torch.float32)) for feature in pyramid.values()]

    def encode(self, features: list[Tensor], sizes: Tensor, images: Tensor) -> Pyramid:
        """The maps that all that follows looks at: those of :meth:`features`, or what an encoder makes of them."""
        first = self.config.first_level
        if not self.config.encoded:
            return Pyramid(features, first)
        levels = levels_of(features, sizes, images)
        m3, m4, m5, m6 = self.encoder(features, levels)
        return Pyramid(list(stage("encoder", m3=m3, m4=m4, m5=m5, m6=m6)), first, levels)

    def decode(
        self, pyramid: Pyramid, boxes: Tensor, allowed: Tensor, sizes: Tensor, heads: Iterable[str]
    ) -> tuple[Proposals, dict[str, HeadOutput]]:
        """Proposals of the anchors `boxes` [B, N, 4] (`cxcywh`, pixels), and what `heads` make of them, by name.

        allowed: [B, 1, N or 1, N] bool attention mask; sizes: [B, 2]. The proposals' boxes get no gradient from a head.
        """
        proposals = self.proposals(pyramid, boxes, allowed, sizes)
        fixed = proposals._replace(boxes=proposals.boxes.detach(), xyzr=proposals.xyzr.detach())
        outputs = {}
        for name in heads:
            queries = proposals.queries + self.head_embedding.weight[HEADS.index(name)]
            outputs[name] = HeadOutput(*self.heads[name](pyramid, queries, fixed, allowed, sizes))
        return proposals, outputs

    def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        """What the chosen head predicts."""
        maps = enumerate(self.features(images), start=self.config.first_level)
        features = list(stage("features", **{f"p{level}": feature for level, feature in maps}))
        pyramid = self.encode(features, sizes, images)
        anchors = self.anchor_generator(pyramid, sizes, self.capacity)
        allowed = attention_allowed(anchors.valid)
        head = self.config.head
        _, outputs = self.decode(pyramid, anchors.boxes, allowed, sizes, (head,))
        logits, boxes = stage("head", logits=outputs[head].logits, boxes=outputs[head].boxes)
        return Predictions(logits, boxes, anchors.valid, anchors.overflow)

    def deployed(self) -> Self:
        """A copy in evaluation mode with the chosen head and as many places for patches as the configuration says."""
        light = copy.copy(self)
        light._modules = {**self._modules, "heads": nn.ModuleDict({self.config.head: self.heads[self.config.head]})}
        model = copy.deepcopy(light)
        model.capacity = self.config.patch_capacity
        return model.eval().requires_grad_(False)
