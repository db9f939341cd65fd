"""The presets: published detectors with their published numbers, and a small one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from asag.families.sap_detr.config import ModelSize, SAPDETRConfig
from asag.family import InputSpec, Preset, Published
from asag.training.recipes import FROM_RANDOM_WEIGHTS, MULTI_SCALE

PAPER = (
    "SAP-DETR: Bridging the Gap Between Salient Points and Queries-Based Transformer Detector for Fast Model"
    " Convergency, CVPR 2023"
)

_TINY = ModelSize(
    backbone_width=32,
    channels=64,
    norm_groups=8,
    attention_heads=4,
    feed_forward=256,
    encoder_layers=2,
    decoder_layers=3,
)

_R50 = SAPDETRConfig()
_R101 = replace(_R50, backbone="resnet101")

_RECIPE = {
    "epochs": 50,
    "milestones": (40,),
    "learning_rate": 1e-4,
    "backbone_learning_rate": 1e-5,
    "warmup_steps": 1000,
    "warmup_start": 0.001,
    **MULTI_SCALE,
    "background_images": True,
}
_TINY_RECIPE = {**FROM_RANDOM_WEIGHTS, "distances_rate": 30.0, "class_weight": 4.0, "epochs": 12}


def _coco(config: SAPDETRConfig, ap: float, images: int) -> Preset:
    """images: of a training step."""
    recipe: dict[str, Any] = {**_RECIPE, "batch_size": images}
    return Preset(config=config, recipe=recipe, published=Published(f"AP {ap}", PAPER, ap=ap))


PRESETS: dict[str, Preset] = {
    "sap-detr-tiny": Preset(
        config=SAPDETRConfig("resnet10", dilation=True, size=_TINY, train_batch_statistics=True),
        input=InputSpec(320, 320, (320, 320)),
        recipe=_TINY_RECIPE,
    ),
    "sap-detr-r50": _coco(_R50, 43.1, 16),
    "sap-detr-dc5-r50": _coco(replace(_R50, dilation=True), 46.0, 8),
    "sap-detr-r101": _coco(_R101, 44.4, 16),
    "sap-detr-dc5-r101": _coco(replace(_R101, dilation=True), 46.9, 8),
}
