"""SAP-DETR: queries own a point of a grid and look towards the sides of their boxes (README.md beside this file)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asag.families.sap_detr.config import FRAMES, SAPDETRConfig
from asag.families.sap_detr.presets import PRESETS
from asag.families.sap_detr.training.settings import SAPDETRSettings
from asag.family import Choice, Family, Stage, Value

if TYPE_CHECKING:
    from asag.detector import Detector
    from asag.published import PublishedFormat
    from asag.training.protocol import Training

TOLERANCE = 1e-4
"""Every stage passes on the rounding of those before it, so they get as much room as detections have in parity."""


def stages(config: SAPDETRConfig) -> tuple[Stage, ...]:
    """The stages of a configuration: nothing is chosen by the data, so no rows have to be paired."""
    queries = Value("queries", "queries")
    boxes = Value("boxes", "boxes", frame="content")
    places = (Value("points", "points", frame="content"), boxes)
    found = [
        Stage("features", (Value("p5", "maps"),)),
        Stage("encoder", (Value("m5", "maps"),), tolerance=TOLERANCE),
        Stage("start", (queries, *places), tolerance=TOLERANCE),
    ]
    last = config.size.decoder_layers - 1
    for layer in range(last + 1):
        values = (Value("gaussians", "gaussians"), queries, *(places if layer < last else ()))
        found.append(Stage(f"decoder_{layer}", values, "decoder", TOLERANCE))
    return (*found, Stage("head", (Value("logits", "scores"), boxes), tolerance=TOLERANCE))


def _build(config: SAPDETRConfig) -> Detector:
    from asag.families.sap_detr.detector import SAPDETRDetector

    return SAPDETRDetector(config)


def _published() -> PublishedFormat:
    from asag.families.sap_detr.published import PublishedSAPDETR

    return PublishedSAPDETR()


def _training(detector: Detector, settings: SAPDETRSettings) -> Training:
    from asag.families.sap_detr.detector import SAPDETRDetector
    from asag.families.sap_detr.training.training import SAPDETRTraining

    assert isinstance(detector, SAPDETRDetector)
    return SAPDETRTraining(detector, settings)


SAP_DETR = Family(
    name="sap_detr",
    title="SAP-DETR",
    config=SAPDETRConfig,
    settings=SAPDETRSettings,
    presets=PRESETS,
    choices=(
        Choice("frame", "What fractions span where features are read: the padded map or the content.", FRAMES),
        Choice("dilation", "Whether the backbone's last stage keeps its stride (DC5), as trained.", form="true|false"),
    ),
    half_layers=("attention.", "feed_forward.mlp", "position_scale", "point_map.convolutions"),
    stages=stages,
    build=_build,
    published=_published,
    training=_training,
)
