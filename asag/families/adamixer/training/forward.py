"""The forward pass of training: which queries meet which stage, and what becomes of them.

Selective query recollection (its paper, section 4.2): a stage trains on what the two stages before it made, not only
the last one. Each set of queries passes the stage by itself, as a *copy*; copies never see one another. The last copy
of every stage is the ordinary path, the only one that there is at inference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from asag.families.adamixer.decoder import DecoderStage
from asag.families.adamixer.detector import AdaMixerDetector
from asag.families.adamixer.geometry import decode_xyzr
from asag.parts.boxes import content_scale
from asag.training.protocol import Batch, Step
from asag.training.transfer import to_device


@dataclass(frozen=True)
class Copies:
    """K sets of queries of B images; `xyzr` in pixels of the input."""

    queries: Tensor
    """[K, B, N, C]"""
    xyzr: Tensor
    """[K, B, N, 4]"""

    def followed_by(self, others: Copies) -> Copies:
        """These, then the others."""
        return Copies(torch.cat((self.queries, others.queries)), torch.cat((self.xyzr, others.xyzr)))


@dataclass(frozen=True)
class StagePredictions:
    """What the copies of one stage say."""

    logits: Tensor
    """[K, B, N, classes]"""
    boxes: Tensor
    """[K, B, N, 4] `cxcywh`, fractions of the content."""


def recollected_copies(stages: int) -> tuple[int, ...]:
    """How many copies each stage trains on: one, two, and from there as many as the two stages before it."""
    counts = [1, 2]
    while len(counts) < stages:
        counts.append(sum(counts[-2:]))
    return tuple(counts[:stages])


def training_outputs(
    detector: AdaMixerDetector, batch: Batch, step: Step, recollection: str
) -> tuple[StagePredictions, ...]:
    """What every stage says; recollection: see :class:`asag.families.adamixer.training.settings.AdaMixerSettings`."""
    precision = step.feature_precision
    with torch.autocast(batch.images.device.type, dtype=precision, enabled=precision is not None):
        features = detector.features(batch.images)
    sizes = to_device(batch.sizes, batch.images.device)
    queries, xyzr = detector.start(sizes)
    before, last = None, Copies(queries.unsqueeze(0), xyzr.unsqueeze(0))
    found = []
    for layer in detector.decoder:
        assert isinstance(layer, DecoderStage)
        given = last if before is None or recollection == "none" else before.followed_by(last)
        run = _one_by_one if recollection == "one_by_one" else _together
        # Boxes teach no earlier stage; queries teach every one that they came through.
        made = run(layer, features, Copies(given.queries, given.xyzr.detach()))
        boxes = decode_xyzr(made.xyzr) / content_scale(sizes)
        found.append(StagePredictions(layer.branches.logits(made.queries), boxes))
        before, last = last, made
    return tuple(found)


def _one_by_one(layer: DecoderStage, features: list[Tensor], given: Copies) -> Copies:
    """Each copy through the stage by itself, and once more when its gradient is computed: in between nothing is kept of
    it but what it began with.
    """
    boxes = decode_xyzr(given.xyzr)
    copies = zip(given.queries, given.xyzr, boxes, strict=True)
    made = [checkpoint(layer, features, *copy, use_reentrant=False, preserve_rng_state=False) for copy in copies]
    queries, xyzr = zip(*made, strict=True)
    return Copies(torch.stack(queries), torch.stack(xyzr))


def _together(layer: DecoderStage, features: list[Tensor], given: Copies) -> Copies:
    """All copies at once: as images of their own where queries see one another, after that as more queries of their
    image, so that no feature map is repeated.
    """
    count, images, each, _ = given.queries.shape
    boxes = decode_xyzr(given.xyzr)
    attended = layer.attention(*(part.flatten(0, 1) for part in (given.queries, given.xyzr, boxes)))

    def by_image(part: Tensor) -> Tensor:
        return part.transpose(0, 1).flatten(1, 2)

    attended = by_image(attended.unflatten(0, (count, images)))
    xyzr = by_image(given.xyzr)
    made = layer.refine(features, attended, layer.points(attended, xyzr, by_image(boxes)), xyzr)
    queries, xyzr = (part.unflatten(1, (count, each)).transpose(0, 1) for part in made)
    return Copies(queries, xyzr)
