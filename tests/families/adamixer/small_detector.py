"""A small AdaMixer with random weights that all matter."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from asag.checkpoint import CheckpointInfo
from asag.detector import build_detector
from asag.families.adamixer.config import AdaMixerConfig
from asag.families.adamixer.detector import AdaMixerDetector
from asag.families.adamixer.presets import PRESETS
from asag.family import InputSpec
from tests.builders import CATEGORY_IDS, CATEGORY_NAMES


def small_config(**changes: Any) -> AdaMixerConfig:
    """`adamixer-tiny` with a thinner backbone, fewer queries and three classes; `changes` replaces fields."""
    tiny = PRESETS["adamixer-tiny"].config
    size = dataclasses.replace(tiny.size, backbone_width=8, feed_forward=64)
    return dataclasses.replace(tiny, **{"num_classes": len(CATEGORY_IDS), "size": size, "queries": 12, **changes})


def small_info(input_size: tuple[int, int] = (160, 192)) -> CheckpointInfo:
    return CheckpointInfo(
        "adamixer-tiny", CATEGORY_IDS, CATEGORY_NAMES, InputSpec(min(input_size), max(input_size), input_size)
    )


def random_detector(config: AdaMixerConfig | None = None, seed: int = 0) -> AdaMixerDetector:
    """What training would start at zero, or with the same value everywhere, is random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = build_detector(config or small_config())
        assert isinstance(detector, AdaMixerDetector)
        with torch.no_grad():
            boxes = detector.initial_boxes
            boxes[:, :2].uniform_(0.2, 0.8)
            boxes[:, 2:].uniform_(0.1, 0.6)
            for name, parameter in detector.named_parameters():
                if "box_deltas" in name or "offsets.weight" in name:
                    parameter.normal_(std=0.1)
                elif "parameters_of_query.weight" in name:
                    parameter.normal_(std=0.2)
                elif name.endswith("class_logits.bias"):
                    parameter.normal_(-2.0, 0.5)
            for norm in detector.backbone.norms():
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.8, 1.2)
    return detector
