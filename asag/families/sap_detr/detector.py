"""The detector: backbone, encoder, points on a grid, decoder."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from asag.detector import Detector, Predictions, stage
from asag.families.sap_detr.config import SAPDETRConfig
from asag.families.sap_detr.decoder import ClassHead, DecoderLayer, PlaceHead, Placement, start_rare
from asag.families.sap_detr.encoder import Encoder
from asag.families.sap_detr.geometry import MapFrame, Places, grid_points
from asag.families.sap_detr.point_map import PointMap, at_grid
from asag.parts.backbones.resnet import ResNet


class Said(NamedTuple):
    """What a layer of the decoder predicts."""

    logits: Tensor
    """[B, N, classes]"""
    boxes: Tensor
    """[B, N, 4] `cxcywh`, fractions of the content."""
    points: Tensor
    """[B, N, 2] (x, y), fractions of the content."""
    queries: Tensor
    """[B, N, C], normed; what else is told of them is training's."""


class SAPDETRDetector(Detector):
    """SAP-DETR; inputs as in :class:`asag.detector.Detector`."""

    config: SAPDETRConfig

    def __init__(self, config: SAPDETRConfig) -> None:
        super().__init__()
        self.config = config
        size, channels = config.size, config.size.channels
        self.backbone = ResNet(
            config.backbone, size.backbone_width, config.train_batch_statistics, dilation=config.dilation
        )
        self.neck = nn.Conv2d(self.backbone.channels[-1], channels, 1)
        self.encoder = Encoder(config)
        self.point_map = PointMap(config)
        self.distances = nn.Parameter(torch.randn(config.queries, 4))
        self.placement = Placement(config)
        self.decoder = nn.ModuleList(DecoderLayer(config, number == 0) for number in range(size.decoder_layers))
        self.decoder_norm = nn.LayerNorm(channels)
        self.place_heads = nn.ModuleList(PlaceHead(config) for _ in range(size.decoder_layers))
        kinds = min(size.decoder_layers, 2)  # all layers after the first share theirs
        self.class_heads = nn.ModuleList(ClassHead(channels, config.classes) for _ in range(kinds))
        self.objectness = nn.Linear(channels, 1)
        self._initialize()

    def _initialize(self) -> None:
        """Matrices of encoder and decoder by Glorot's rule, attentions as PyTorch's begins, heads as equal copies."""
        for part in (self.encoder, self.decoder, self.placement.scale):
            zero = "attention." if part is self.encoder else "attention.output_projection."
            for name, parameter in part.named_parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
                elif zero in name:
                    nn.init.zeros_(parameter)
        for heads in (self.place_heads, self.class_heads):
            for head in heads[1:]:
                head.load_state_dict(heads[0].state_dict())
        start_rare(self.objectness)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images -> one map [B, C, h, w]; in float32 where autocast made it less."""
        feature = self.neck(self.backbone(images)[-1])
        return [feature.to(torch.promote_types(feature.dtype, torch.float32))]

    def frame_of(self, map_: Tensor, images: Tensor, sizes: Tensor) -> MapFrame:
        """How the contents of `images` lie on their map."""
        shape, input_size = (map_.shape[-2], map_.shape[-1]), (images.shape[-2], images.shape[-1])
        return MapFrame.of(self.config.frame, shape, sizes, input_size)

    def start(self, map_: Tensor, frame: MapFrame) -> tuple[Tensor, Places]:
        """The encoder's map [B, C, h, w] -> queries [B, N, C], and where they are."""
        queries = at_grid(self.point_map(map_, frame), frame, self.config)
        points = grid_points(self.config, map_.device).expand(map_.shape[0], -1, -1)
        return queries, Places.of(points, self.distances.sigmoid().expand(map_.shape[0], -1, -1))

    def class_head(self, layer: int) -> ClassHead:
        """What tells the classes of a decoder layer."""
        head = self.class_heads[min(layer, 1)]
        assert isinstance(head, ClassHead)
        return head

    def place_head(self, layer: int) -> PlaceHead:
        """What moves the points and sides of a decoder layer."""
        head = self.place_heads[layer]
        assert isinstance(head, PlaceHead)
        return head

    def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        """What the last layer predicts."""
        (p5,) = stage("features", p5=self.features(images)[0])
        frame = self.frame_of(p5, images, sizes)
        memory = self.encoder(p5, frame)
        (m5,) = stage("encoder", m5=memory.tokens.transpose(1, 2).unflatten(2, p5.shape[-2:]))
        memory = replace(memory, tokens=m5.flatten(2).transpose(1, 2))
        queries, places = self.start(m5, frame)
        queries, *seen = stage("start", queries=queries, points=places.points, boxes=places.boxes)
        places = Places(seen[0], places.distances, seen[1])
        lagging, last = places.points, len(self.decoder) - 1
        for number, layer in enumerate(self.decoder):
            assert isinstance(layer, DecoderLayer)
            name, head = f"decoder_{number}", self.place_head(number)
            queries, placed = layer.attend(queries, places, self.placement)
            (gaussians,) = stage(name, gaussians=layer.gaussian(queries, places, frame))
            (queries,) = stage(name, queries=layer.look(queries, gaussians, placed, memory))
            if number < last:
                lagging, moved = places.points, head.moved(queries, places)
                points, boxes = stage(name, points=moved.points, boxes=moved.boxes)
                places = Places(points, moved.distances, boxes)
        found = self.say(last, queries, lagging, places.distances)
        return Predictions(*stage("head", logits=found.logits, boxes=found.boxes))

    def say(self, layer: int, queries: Tensor, points: Tensor, distances: Tensor) -> Said:
        """What a layer predicts of the queries that it made, [B, N, C].

        points: those that the layer before it received, which lag behind, as trained weights expect it; distances:
        those that it received itself.
        """
        queries, head = self.decoder_norm(queries), self.place_head(layer)
        places = Places.of(head.points(queries, points), head.sides(queries, distances))
        return Said(self.class_head(layer)(queries), places.boxes, places.points, queries)

    def deployed(self) -> Self:
        """A copy in evaluation mode without what only training hears."""
        model = copy.deepcopy(self)
        del model.objectness
        if len(model.class_heads) > 1:
            model.class_heads[0] = nn.Identity()
        return model.eval().requires_grad_(False)
