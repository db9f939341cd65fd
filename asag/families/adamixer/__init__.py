"""AdaMixer: learned queries, and a decoder that samples and mixes features for them (README.md beside this file)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asag.families.adamixer.config import AdaMixerConfig
from asag.families.adamixer.presets import PRESETS
from asag.families.adamixer.training.settings import AdaMixerSettings
from asag.family import Family, Stage, Value

if TYPE_CHECKING:
    from asag.detector import Detector
    from asag.published import PublishedFormat
    from asag.training.protocol import Training

QUERY_TOLERANCE = 1e-4
"""Every stage passes on the rounding of those before it, so they get as much room as detections have in parity."""


def stages(config: AdaMixerConfig) -> tuple[Stage, ...]:
    """The stages of a configuration: nothing is chosen by the data, so no rows have to be paired."""
    queries = (Value("queries", "queries"), Value("xyzr", "queries", exported=False), Value("boxes", "boxes"))
    layer = (Value("points", "points"), *queries)
    layers = [Stage(f"decoder_{number}", layer, "decoder", QUERY_TOLERANCE) for number in range(config.stages)]
    head = (Value("logits", "scores"), Value("boxes", "boxes", frame="content"))
    return (
        Stage("features", tuple(Value(f"p{level}", "maps") for level in (2, 3, 4, 5))),
        Stage("start", queries),
        *layers,
        Stage("head", head, tolerance=QUERY_TOLERANCE),
    )


def _build(config: AdaMixerConfig) -> Detector:
    from asag.families.adamixer.detector import AdaMixerDetector

    return AdaMixerDetector(config)


def _published() -> PublishedFormat:
    from asag.families.adamixer.published import PublishedAdaMixer

    return PublishedAdaMixer()


def _training(detector: Detector, settings: AdaMixerSettings) -> Training:
    from asag.families.adamixer.detector import AdaMixerDetector
    from asag.families.adamixer.training.training import AdaMixerTraining

    assert isinstance(detector, AdaMixerDetector)
    return AdaMixerTraining(detector, settings)


ADAMIXER = Family(
    name="adamixer",
    title="AdaMixer",
    config=AdaMixerConfig,
    settings=AdaMixerSettings,
    presets=PRESETS,
    choices=(),
    half_layers=("parameters_of_query", "out_projection", "feed_forward.mlp"),
    stages=stages,
    build=_build,
    published=_published,
    training=_training,
)
