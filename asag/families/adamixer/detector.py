"""The detector: backbone, neck, learned starting queries and a decoder of several stages."""

from __future__ import annotations

import copy
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag.detector import Detector, Predictions, stage
from asag.families.adamixer.config import AdaMixerConfig
from asag.families.adamixer.decoder import DecoderStage
from asag.families.adamixer.geometry import decode_xyzr, encode_xyzr
from asag.families.adamixer.neck import ChannelNeck
from asag.parts.backbones.resnet import ResNet
from asag.parts.boxes import content_scale


class AdaMixerDetector(Detector):
    """AdaMixer; inputs as in :class:`asag.detector.Detector`."""

    config: AdaMixerConfig

    def __init__(self, config: AdaMixerConfig) -> None:
        super().__init__()
        self.config = config
        size = config.size
        self.backbone = ResNet(config.backbone, size.backbone_width, config.train_batch_statistics)
        self.neck = ChannelNeck(self.backbone.channels, size.channels, size.norm_groups)
        # Every query begins as the whole image. No gradient reaches these boxes, but files of weights have them.
        whole = torch.tensor((0.5, 0.5, 1.0, 1.0)).repeat(config.queries, 1)
        self.initial_boxes = nn.Parameter(whole, requires_grad=False)
        self.initial_queries = nn.Parameter(torch.randn(config.queries, size.channels))
        self.decoder = nn.ModuleList(DecoderStage(config) for _ in range(config.stages))

    def features(self, images: Tensor) -> list[Tensor]:
        """Images -> P2..P5, each [B, C, H/stride, W/stride]; in float32 where autocast made them less."""
        pyramid = self.neck(self.backbone(images))
        return [feature.to(torch.promote_types(feature.dtype, torch.float32)) for feature in pyramid]

    def start(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Content sizes [B, 2] -> what the decoder begins with: queries [B, N, C] and `xyzr` [B, N, 4] in pixels."""
        queries = F.layer_norm(self.initial_queries, self.initial_queries.shape[-1:])
        xyzr = encode_xyzr(self.initial_boxes * content_scale(sizes))
        return queries.unsqueeze(0).expand(sizes.shape[0], -1, -1), xyzr

    def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        """What the last stage predicts."""
        p2, p3, p4, p5 = self.features(images)
        features = list(stage("features", p2=p2, p3=p3, p4=p4, p5=p5))
        queries, xyzr = self.start(sizes)
        queries, xyzr, boxes = stage("start", queries=queries, xyzr=xyzr, boxes=decode_xyzr(xyzr))
        for number, layer in enumerate(self.decoder):
            assert isinstance(layer, DecoderStage)
            attended = layer.attention(queries, xyzr, boxes)
            (points,) = stage(f"decoder_{number}", points=layer.points(attended, xyzr, boxes))
            queries, xyzr = layer.refine(features, attended, points, xyzr)
            queries, xyzr, boxes = stage(f"decoder_{number}", queries=queries, xyzr=xyzr, boxes=decode_xyzr(xyzr))
        logits = self.decoder[-1].branches.logits(queries)  # type: ignore[union-attr, operator]
        logits, boxes = stage("head", logits=logits, boxes=boxes / content_scale(sizes))
        return Predictions(logits, boxes)

    def deployed(self) -> Self:
        """A copy in evaluation mode in which only the last stage can tell classes."""
        model = copy.deepcopy(self)
        for layer in model.decoder[:-1]:
            assert isinstance(layer, DecoderStage)
            del layer.branches.class_branch, layer.branches.class_logits
        return model.eval().requires_grad_(False)
