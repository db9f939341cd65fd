"""Deformable, Efficient and Sparse DETR: one network with switches (README.md beside this file)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asag.families.deformable.config import DeformableConfig
from asag.families.deformable.presets import PRESETS
from asag.families.deformable.training.settings import DeformableSettings
from asag.family import Choice, Family, Stage, Value

if TYPE_CHECKING:
    from asag.detector import Detector
    from asag.published import PublishedFormat
    from asag.training.protocol import Training

TOLERANCE = 1e-4
"""Every stage passes on the rounding of those before it, so they get as much room as detections have in parity."""


def stages(config: DeformableConfig) -> tuple[Stage, ...]:
    """The stages of a configuration. Which tokens are kept, and which become queries, the model chooses."""
    queries, boxes = Value("queries", "queries"), Value("boxes", "boxes", frame="content")
    found = [Stage("features", tuple(Value(f"p{level}", "maps") for level in (3, 4, 5, 6)))]
    if config.sparse:
        kept = (Value("cells", "cells"), Value("active", "valid"))
        found += [
            Stage("token_scores", (Value("scores", "queries"),), "selection", TOLERANCE),
            Stage("kept_tokens", kept, "selection", TOLERANCE, aligns=True),
        ]
    found.append(Stage("encoder", tuple(Value(f"m{level}", "maps") for level in (3, 4, 5, 6)), tolerance=TOLERANCE))
    if config.two_stage:
        found.append(Stage("proposals", (queries, boxes), tolerance=TOLERANCE, aligns=True))
    else:
        found.append(Stage("start", (queries, Value("points", "points", frame="content"))))
    last = config.size.decoder_layers - 1
    for layer in range(last):
        values = (queries, boxes) if config.refine_boxes else (queries,)
        found.append(Stage(f"decoder_{layer}", values, "decoder", TOLERANCE))
    looks = Value("points", "points", frame="padded")
    found.append(Stage(f"decoder_{last}", (looks, queries), "decoder", TOLERANCE))
    return (*found, Stage("head", (Value("logits", "scores"), boxes), tolerance=TOLERANCE))


def _build(config: DeformableConfig) -> Detector:
    from asag.families.deformable.detector import DeformableDetector

    return DeformableDetector(config)


def _published() -> PublishedFormat:
    from asag.families.deformable.published import PublishedDeformable

    return PublishedDeformable()


def _training(detector: Detector, settings: DeformableSettings) -> Training:
    from asag.families.deformable.detector import DeformableDetector
    from asag.families.deformable.training.training import DeformableTraining

    assert isinstance(detector, DeformableDetector)
    return DeformableTraining(detector, settings)


DEFORMABLE = Family(
    name="deformable",
    title="Deformable DETR",
    config=DeformableConfig,
    settings=DeformableSettings,
    presets=PRESETS,
    choices=(Choice("keeping_ratio", "Share of the tokens that a sparse encoder refines.", form="0.3"),),
    # What scores tokens stays float32: it decides which of them there are.
    half_layers=("value_projection", "output_projection", "feed_forward.mlp"),
    stages=stages,
    build=_build,
    published=_published,
    training=_training,
)
