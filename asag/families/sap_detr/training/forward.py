"""The forward pass of training: what every layer says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asag.families.sap_detr.decoder import DecoderLayer
from asag.families.sap_detr.detector import SAPDETRDetector
from asag.families.sap_detr.geometry import Places
from asag.training.protocol import Batch, Step
from asag.training.transfer import to_device


@dataclass(frozen=True)
class LayerPredictions:
    """What a layer says."""

    logits: Tensor
    """[B, N, classes]"""
    objectness: Tensor
    """[B, N], logits of how well the box lies on an object."""
    boxes: Tensor
    """[B, N, 4] `cxcywh`, fractions of the content."""
    points: Tensor
    """[B, N, 2] (x, y), fractions of the content."""


def training_outputs(detector: SAPDETRDetector, batch: Batch, step: Step) -> tuple[LayerPredictions, ...]:
    """Of every layer, in order."""
    precision = step.feature_precision
    with torch.autocast(batch.images.device.type, dtype=precision, enabled=precision is not None):
        (map_,) = detector.features(batch.images)
    frame = detector.frame_of(map_, batch.images, to_device(batch.sizes, map_.device))
    memory = detector.encoder(map_, frame)
    queries, places = detector.start(memory.tokens.transpose(1, 2).unflatten(2, map_.shape[-2:]), frame)
    lagging, distances = places.points, places.distances
    found = []
    for number, layer in enumerate(detector.decoder):
        assert isinstance(layer, DecoderLayer)
        queries, placed = layer.attend(queries, places, detector.placement)
        queries = layer.look(queries, layer.gaussian(queries, places, frame), placed, memory)
        said = detector.say(number, queries, lagging, distances)
        objectness = detector.objectness(said.queries).squeeze(-1)
        found.append(LayerPredictions(said.logits, objectness, said.boxes, said.points))
        moved = detector.place_head(number).moved(queries, places)
        lagging = places.points
        # A layer's box teaches the layer before how far its sides were moved; what the next layers see of it does not.
        distances, places = moved.distances, Places.of(moved.points.detach(), moved.distances.detach())
    return tuple(found)
