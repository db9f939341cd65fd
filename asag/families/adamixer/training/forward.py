"""The forward pass of training: which queries meet which stage, and what becomes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from asag.families.adamixer.decoder import DecoderStage
from asag.families.adamixer.detector import AdaMixerDetector
from asag.families.adamixer.geometry import decode_xyzr
from asag.parts.boxes import content_scale
from asag.training.protocol import Batch, Step
from asag.training.recollection import (
    Copies,
    StagePredictions,
    as_copies,
    as_images,
    as_queries,
    one_by_one,
    recollected,
)
from asag.training.transfer import to_device


def training_outputs(
    detector: AdaMixerDetector, batch: Batch, step: Step, recollection: str
) -> tuple[StagePredictions, ...]:
    """What every stage says; recollection: one of :data:`asag.training.settings.RECOLLECTIONS`."""
    precision = step.feature_precision
    with torch.autocast(batch.images.device.type, dtype=precision, enabled=precision is not None):
        features = detector.features(batch.images)
    sizes = to_device(batch.sizes, batch.images.device)
    queries, xyzr = detector.start(sizes)
    before: Copies | None = None
    last: Copies = (queries.unsqueeze(0), xyzr.unsqueeze(0))
    found = []
    for layer in detector.decoder:
        assert isinstance(layer, DecoderStage)
        queries, xyzr = recollected(before, last, recollection)
        run = _one_by_one if recollection == "one_by_one" else _together
        # Boxes teach no earlier stage; queries teach every one that they came through.
        queries, xyzr = run(layer, features, queries, xyzr.detach())
        boxes = decode_xyzr(xyzr) / content_scale(sizes)
        found.append(StagePredictions(layer.branches.logits(queries), boxes))
        before, last = last, (queries, xyzr)
    return tuple(found)


def _one_by_one(layer: DecoderStage, features: list[Tensor], queries: Tensor, xyzr: Tensor) -> Copies:
    """Each copy through the stage by itself: queries [K, B, N, C], xyzr [K, B, N, 4] -> the same."""
    return one_by_one(lambda *copy: layer(features, *copy, decode_xyzr(copy[1])), (queries, xyzr))


def _together(layer: DecoderStage, features: list[Tensor], queries: Tensor, xyzr: Tensor) -> Copies:
    """All copies at once; shapes as in :func:`_one_by_one`."""
    count, boxes = len(queries), decode_xyzr(xyzr)
    attended = as_queries(layer.attention(*map(as_images, (queries, xyzr, boxes))).unflatten(0, (count, -1)))
    points = layer.points(attended, as_queries(xyzr), as_queries(boxes))
    made = layer.refine(features, attended, points, as_queries(xyzr))
    return tuple(as_copies(part, count) for part in made)
