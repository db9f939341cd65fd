"""ASAG: a decoder of one layer with adaptive sparse anchors (README.md beside this file)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asag.families.asag.config import HEADS, LEVELS, ASAGConfig
from asag.families.asag.presets import PRESETS
from asag.families.asag.training.settings import ASAGSettings
from asag.family import Choice, Family, Stage, Value

if TYPE_CHECKING:
    from asag.detector import Detector
    from asag.published import PublishedFormat
    from asag.training.protocol import Training

PATCH_CELLS = {"P4": (16, 15), "P3": (8, 15)}
"""Of each probed level: pixels of a cell, and cells along each side of a patch."""

POINT_UNIT = 4
"""Pixels of a unit of sampling points."""

QUERY_TOLERANCE = 1e-4
"""Queries that compete for an object magnify the rounding of their anchors' coordinates, so the stages that compare
queries get as much room as detections have in parity."""


def stages(config: ASAGConfig) -> tuple[Stage, ...]:
    """The stages of a configuration."""
    # An encoder passes on the rounding of the maps, and then all that follows does.
    tolerance = QUERY_TOLERANCE if config.encoded else Stage.tolerance
    levels = range(config.first_level, config.first_level + 4)
    found = [Stage("features", tuple(Value(f"p{level}", "maps") for level in levels))]
    if config.encoded:
        found.append(Stage("encoder", tuple(Value(f"m{level}", "maps") for level in levels), tolerance=tolerance))
    found.append(Stage("coarse_anchors", (Value("boxes", "boxes"),), "anchors", tolerance))
    for level in config.probed_levels:
        patches = (Value("map", "maps"), Value("corners", "places", cell=PATCH_CELLS[level]), Value("valid", "valid"))
        found += [
            Stage(f"{level}_patches", patches, "anchors", tolerance, aligns=True),
            Stage(f"{level}_anchors", (Value("boxes", "boxes"),), "anchors", tolerance),
        ]
    # The next step of one decoder works on `xyzr`, that of the others on boxes.
    works_on_boxes = config.decoder != "adamixer"
    proposals = (
        Value("queries", "queries"),
        Value("xyzr", "queries", exported=not works_on_boxes),
        Value("boxes", "boxes", frame="content", exported=works_on_boxes),
        Value("logits", "scores", exported=False),
    )
    looks = {
        "adamixer": (Value("points", "points", unit=POINT_UNIT),),
        "deformable": (Value("points", "points", frame="padded"),),
    }
    head = (*looks.get(config.decoder, ()), Value("logits", "scores"), Value("boxes", "boxes", frame="content"))
    return (
        *found,
        Stage("anchors", (Value("boxes", "boxes"), Value("valid", "valid")), tolerance=tolerance, aligns=True),
        Stage("proposals", proposals, tolerance=QUERY_TOLERANCE),
        Stage("head", head, tolerance=QUERY_TOLERANCE),
    )


def _build(config: ASAGConfig) -> Detector:
    from asag.families.asag.detector import ASAGDetector

    return ASAGDetector(config)


def _published() -> PublishedFormat:
    from asag.families.asag.published import PublishedASAG

    return PublishedASAG()


def _training(detector: Detector, settings: ASAGSettings) -> Training:
    from asag.families.asag.detector import ASAGDetector
    from asag.families.asag.training.training import ASAGTraining

    assert isinstance(detector, ASAGDetector)
    return ASAGTraining(detector, settings)


ASAG = Family(
    name="asag",
    title="ASAG",
    config=ASAGConfig,
    settings=ASAGSettings,
    presets=PRESETS,
    choices=(
        Choice("head", "Which of a checkpoint's trained heads.", HEADS),
        Choice("levels", "Which levels a checkpoint explores: fewer are faster and miss small objects.", LEVELS),
        Choice(
            "patch_capacity",
            "Patches per image that the model has room for on P4 and P3; what finds none is counted in `overflow`.",
            form="P4,P3",
        ),
    ),
    half_layers=(
        "roi_projection",
        "parameters_of_query",
        "out_projection",
        "value_projection",
        "output_projection",
        "feed_forward.mlp",
    ),
    stages=stages,
    build=_build,
    published=_published,
    training=_training,
)
