"""Small detectors of the family with random weights that all matter."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from asag.checkpoint import CheckpointInfo
from asag.detector import build_detector
from asag.families.deformable.config import DeformableConfig
from asag.families.deformable.detector import DeformableDetector
from asag.families.deformable.presets import PRESETS
from asag.family import InputSpec
from tests.builders import CATEGORY_IDS, CATEGORY_NAMES

PLAIN, SPARSE = "deformable-detr-tiny", "sparse-detr-tiny"


def small_config(preset: str = SPARSE, **changes: Any) -> DeformableConfig:
    """A tiny preset with a thinner backbone, fewer queries and three classes; `changes` replaces fields."""
    tiny = PRESETS[preset].config
    size = dataclasses.replace(tiny.size, backbone_width=8, channels=32, feed_forward=64, encoder_layers=2)
    return dataclasses.replace(tiny, **{"num_classes": len(CATEGORY_IDS), "size": size, "queries": 12, **changes})


def small_info(preset: str = SPARSE, input_size: tuple[int, int] = (160, 192)) -> CheckpointInfo:
    return CheckpointInfo(preset, CATEGORY_IDS, CATEGORY_NAMES, InputSpec(min(input_size), max(input_size), input_size))


def random_detector(config: DeformableConfig | None = None, seed: int = 0) -> DeformableDetector:
    """What training would start at zero, or with the same value everywhere, is random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = build_detector(config or small_config())
        assert isinstance(detector, DeformableDetector)
        with torch.no_grad():
            for name, parameter in detector.named_parameters():
                if "attention.offsets.weight" in name or "attention.weights.weight" in name:
                    parameter.normal_(std=0.3)
                elif "box_deltas.4.weight" in name:
                    parameter.normal_(std=0.1)
                elif name.endswith("class_logits.bias"):
                    parameter.normal_(-2.0, 0.5)
                elif "norm" in name and name.endswith("bias"):
                    parameter.normal_(std=0.1)
            for norm in detector.backbone.norms():
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.8, 1.2)
    return detector
