"""The presets: published detectors with their published numbers, and small ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from asag.families.deformable.config import DeformableConfig, ModelSize
from asag.family import InputSpec, Preset, Published
from asag.training.recipes import FROM_RANDOM_WEIGHTS, MULTI_SCALE

DEFORMABLE_PAPER = "Deformable DETR: Deformable Transformers for End-to-End Object Detection, ICLR 2021"
SPARSE_PAPER = "Sparse DETR: Efficient End-to-End Object Detection with Learnable Sparsity, ICLR 2022"
RECOLLECTION_PAPER = "Enhanced Training of Query-Based Object Detection via Selective Query Recollection, CVPR 2023"

_TINY = ModelSize(
    backbone_width=32,
    channels=64,
    norm_groups=8,
    attention_heads=4,
    feed_forward=256,
    encoder_layers=3,
    decoder_layers=3,
)

_PLAIN = DeformableConfig()
_REFINE = replace(_PLAIN, head_per_layer=True, refine_boxes=True)
_TWO_STAGE = replace(_REFINE, two_stage=True)
_EFFICIENT = replace(_TWO_STAGE, content_from_memory=True, rank_by_class=True)
_SPARSE = replace(_EFFICIENT, keeping_ratio=0.1, encoder_heads=True)
_MMDETECTION = replace(_PLAIN, projection_bias=False, clip_boxes=True)

_RECIPE = {
    "epochs": 50,
    "milestones": (40,),
    "warmup_steps": 0,
    **MULTI_SCALE,
    "background_images": True,
}
_RECOLLECTED = {**_RECIPE, "batch_size": 32, "recollection": "batched"}
_TINY_RECIPE = {**FROM_RANDOM_WEIGHTS, "epochs": 8}


def _coco(config: DeformableConfig, ap: float, paper: str, recipe: Mapping[str, Any] = _RECIPE) -> Preset:
    # MMDetection, whose projections have no bias, resizes without antialiasing.
    resized = InputSpec(interpolation="antialias" if config.projection_bias else "bilinear")
    return Preset(config=config, input=resized, recipe=recipe, published=Published(f"AP {ap}", paper, ap=ap))


def _sparse(name: str, config: DeformableConfig, precisions: tuple[float, ...]) -> Iterator[tuple[str, Preset]]:
    """One preset for each tenth of the tokens that is kept."""
    for tenth, ap in enumerate(precisions, start=1):
        yield f"{name}-{10 * tenth}", _coco(replace(config, keeping_ratio=tenth / 10), ap, SPARSE_PAPER)


def _swin(config: DeformableConfig) -> DeformableConfig:
    return replace(config, backbone="swin-t", size=replace(config.size, backbone_width=96))


def _tiny(config: DeformableConfig, **changes: Any) -> Preset:
    config = replace(config, backbone="resnet10", queries=40, size=_TINY, train_batch_statistics=True, **changes)
    return Preset(config=config, input=InputSpec(320, 320, (320, 320)), recipe=_TINY_RECIPE)


PRESETS: dict[str, Preset] = {
    "deformable-detr-tiny": _tiny(_PLAIN),
    "sparse-detr-tiny": _tiny(_SPARSE, keeping_ratio=0.3),
    # Refinement and two stages: numbers of the original repository; the others are of the follow-ups.
    "deformable-detr-r50": _coco(_PLAIN, 43.9, SPARSE_PAPER),
    "deformable-detr-r50-refine": _coco(_REFINE, 46.2, DEFORMABLE_PAPER),
    "deformable-detr-r50-two-stage": _coco(_TWO_STAGE, 46.9, DEFORMABLE_PAPER),
    "deformable-detr-swin-t": _coco(_swin(_PLAIN), 45.7, SPARSE_PAPER),
    "efficient-detr-r50": _coco(_EFFICIENT, 46.0, SPARSE_PAPER),
    "efficient-detr-swin-t": _coco(_swin(_EFFICIENT), 48.0, SPARSE_PAPER),
    **dict(_sparse("sparse-detr-r50", _SPARSE, (45.3, 45.6, 46.0, 46.2, 46.3))),
    **dict(_sparse("sparse-detr-r50-scrl", _SPARSE, (46.9, 47.2, 47.4, 47.7, 47.9))),
    **dict(_sparse("sparse-detr-swin-t", _swin(_SPARSE), (48.2, 48.8, 49.1, 49.2, 49.3))),
    "deformable-detr-r50-50e": _coco(_MMDETECTION, 44.5, RECOLLECTION_PAPER),
    "sqr-deformable-detr-r50-50e": _coco(_MMDETECTION, 45.8, RECOLLECTION_PAPER, _RECOLLECTED),
}
