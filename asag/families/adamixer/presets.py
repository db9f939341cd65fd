"""The presets: published detectors with their published numbers, and a small one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from asag.families.adamixer.config import AdaMixerConfig, ModelSize
from asag.family import InputSpec, Preset, Published
from asag.training.recipes import FROM_RANDOM_WEIGHTS, MULTI_SCALE

ADAMIXER_PAPER = "AdaMixer: A Fast-Converging Query-Based Object Detector, CVPR 2022"
RECOLLECTION_PAPER = "Enhanced Training of Query-Based Object Detection via Selective Query Recollection, CVPR 2023"

_TINY = ModelSize(
    backbone_width=32,
    channels=64,
    norm_groups=8,
    feed_forward=256,
    attention_heads=4,
    sampling_groups=4,
    sampling_points=16,
    mixed_points=32,
)

_R50_100 = AdaMixerConfig()
_R50_300 = replace(_R50_100, queries=300)
_R101_300 = replace(_R50_300, backbone="resnet101")

_COMMON = {
    "learning_rate": 2.5e-5,
    "backbone_learning_rate": 2.5e-5,
    "gradient_clip": 1.0,
    "warmup_start": 0.001,
}
_SHORT = {**_COMMON, "epochs": 12, "milestones": (8, 11)}
_LONG = {**_COMMON, **MULTI_SCALE, "epochs": 36, "milestones": (24, 33)}
_RECOLLECTED = {"recollection": "batched"}
_TINY_RECIPE = {**FROM_RANDOM_WEIGHTS, "epochs": 12}


def _coco(config: AdaMixerConfig, recipe: Mapping[str, Any], ap: float, paper: str = ADAMIXER_PAPER) -> Preset:
    resized = InputSpec(interpolation="bilinear")
    return Preset(config=config, input=resized, recipe=recipe, published=Published(f"AP {ap}", paper, ap=ap))


PRESETS: dict[str, Preset] = {
    "adamixer-tiny": Preset(
        config=AdaMixerConfig("resnet10", queries=40, stages=3, size=_TINY, train_batch_statistics=True),
        input=InputSpec(320, 320, (320, 320)),
        recipe=_TINY_RECIPE,
    ),
    "adamixer-r50-1x-100": _coco(_R50_100, _SHORT, 42.7),
    "adamixer-r50-3x-300": _coco(_R50_300, _LONG, 47.0),
    "adamixer-r101-3x-300": _coco(_R101_300, _LONG, 48.0),
    "sqr-adamixer-r50-1x-100": _coco(_R50_100, {**_SHORT, **_RECOLLECTED}, 44.5, RECOLLECTION_PAPER),
    "sqr-adamixer-r101-3x-300": _coco(
        replace(_R101_300, stages=7), {**_LONG, **_RECOLLECTED}, 49.8, RECOLLECTION_PAPER
    ),
}
