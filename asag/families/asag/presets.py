"""The presets: published detectors with their published numbers, and the small one of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from asag.families.asag.config import ASAGConfig, ModelSize
from asag.family import InputSpec, Preset, Published

_TINY = ModelSize(
    backbone_width=32,
    channels=64,
    compressed_channels=32,
    anchor_hidden=256,
    feed_forward=256,
    attention_heads=4,
    sampling_groups=4,
    sampling_points=16,
    mixed_points=32,
    dynamic_channels=16,
)

_ENCODED_TINY = replace(_TINY, norm_groups=8, encoder_layers=2, deformable_feed_forward=256)

_A_R50_100 = ASAGConfig("adamixer", "resnet50", 100, head="aux_2")
_A_R50_300 = replace(_A_R50_100, queries=300)
_S_R50_100 = replace(_A_R50_100, decoder="sparse_rcnn")
_D_R50_300 = replace(_A_R50_300, decoder="deformable", head="main")

# A trained detector explores at once: the epoch in which the objects' places guide it is for those that know nothing.
_CONTINUED = {"first_epoch": 1}
_SHORT = {"epochs": 12, "milestones": (8, 11)}
_MULTI_SCALE = {"training_shorter_sides": tuple(range(640, 801, 32)), "crop_probability": 0.5}
_LONG = {"epochs": 36, "milestones": (24, 33), **_MULTI_SCALE}
_TINY_RECIPE = {
    # Starts from random weights on few small images: the backbone learns as fast as the rest, and steps are as large
    # as the clipped gradients allow. A larger rate or less decay reach a higher AP sooner, but the detector then
    # answers to the last bits of its anchors, and backends agree less (docs/training.md).
    "epochs": 24,
    "batch_size": 8,
    "learning_rate": 6e-4,
    "backbone_learning_rate": 6e-4,
    "weight_decay": 0.05,
    "gradient_clip": 5.0,
    "warmup_steps": 200,
    "schedule": "cosine",
    "milestones": (),
    "ema_decay": 0.998,
    # Reading such images takes a hundredth of a step; another process would only compete for the cores.
    "workers": 0,
}


PAPER = "ASAG: Building Strong One-Decoder-Layer Sparse Detectors via Adaptive Sparse Anchor Generation, ICCV 2023"


def _coco(config: ASAGConfig, recipe: Mapping[str, Any], ap: float, queries: str) -> Preset:
    published = Published(f"AP {ap}", PAPER, queries, ap)
    return Preset(config=config, recipe=recipe, continued=_CONTINUED, published=published)


PRESETS: dict[str, Preset] = {
    "asag-a-tiny": Preset(
        config=ASAGConfig("adamixer", "resnet10", 50, patch_capacity=(16, 32), size=_TINY, train_batch_statistics=True),
        input=InputSpec(320, 320, (320, 320)),
        recipe=_TINY_RECIPE,
        continued=_CONTINUED,
    ),
    "asag-d-tiny": Preset(
        config=ASAGConfig(
            "deformable", "resnet10", 50, patch_capacity=(16, 32), size=_ENCODED_TINY, train_batch_statistics=True
        ),
        input=InputSpec(320, 320, (320, 320)),
        recipe=_TINY_RECIPE,
        continued=_CONTINUED,
    ),
    "asag-a-r50-1x-100": _coco(_A_R50_100, _SHORT, 42.6, "107"),
    "asag-a-r50-1x-300": _coco(_A_R50_300, _SHORT, 43.6, "329"),
    "asag-a-r50-3x-100": _coco(replace(_A_R50_100, head="main"), _LONG, 45.3, "102"),
    "asag-a-r50-3x-300": _coco(_A_R50_300, _LONG, 46.3, "312"),
    "asag-a-r101-3x-300": _coco(replace(_A_R50_300, backbone="resnet101"), _LONG, 47.5, "296"),
    "asag-s-r50-3x-100": _coco(_S_R50_100, _LONG, 43.9, "100"),
    "asag-s-r50-3x-300": _coco(replace(_S_R50_100, queries=300), _LONG, 45.0, "312"),
    "asag-d-r50-3x-300": _coco(_D_R50_300, _LONG, 45.8, ""),
    "asag-a-dn-r50-1x-100": _coco(_A_R50_100, {**_SHORT, "denoising_scale": 0.4}, 43.1, "106"),
    "asag-a-crosscl-r50-1x-100": _coco(_A_R50_100, _SHORT, 43.8, "103"),
    "asag-s-crowdhuman": Preset(
        config=replace(
            _S_R50_100, queries=300, dataset="crowdhuman", head="aux_0", num_classes=1, patch_capacity=(60, 60)
        ),
        input=InputSpec(800, 1500, (800, 1504)),
        recipe={"epochs": 50, "milestones": (40, 46), **_MULTI_SCALE},
        continued=_CONTINUED,
        dataset="crowdhuman",
        published=Published("AP 91.3, mMR 43.5, recall 96.9", PAPER, "<=500"),
    ),
}
