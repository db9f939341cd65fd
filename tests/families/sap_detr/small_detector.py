"""Small detectors of the family with random weights that all matter."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from asag.checkpoint import CheckpointInfo
from asag.detector import build_detector
from asag.families.sap_detr.config import SAPDETRConfig
from asag.families.sap_detr.detector import SAPDETRDetector
from asag.families.sap_detr.presets import PRESETS
from asag.family import InputSpec
from tests.builders import CATEGORY_IDS, CATEGORY_NAMES

TINY = "sap-detr-tiny"


def small_config(**changes: Any) -> SAPDETRConfig:
    """The tiny preset with a thinner backbone, fewer points and three classes; `changes` replaces fields."""
    tiny = PRESETS[TINY].config
    size = dataclasses.replace(tiny.size, backbone_width=8, channels=32, feed_forward=64)
    small = {"num_classes": len(CATEGORY_IDS), "size": size, "columns": 5, "rows": 4}
    return dataclasses.replace(tiny, **{**small, **changes})


def small_info(input_size: tuple[int, int] = (160, 192)) -> CheckpointInfo:
    return CheckpointInfo(TINY, CATEGORY_IDS, CATEGORY_NAMES, InputSpec(min(input_size), max(input_size), input_size))


def random_detector(config: SAPDETRConfig | None = None, seed: int = 0) -> SAPDETRDetector:
    """What training would start at zero, at the same value everywhere, or as a copy, is random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = build_detector(config or small_config())
        assert isinstance(detector, SAPDETRDetector)
        with torch.no_grad():
            for name, parameter in detector.named_parameters():
                if name.startswith("backbone"):
                    continue
                if name.startswith(("place_heads", "class_heads")) and parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
                elif name.startswith("point_map.convolutions"):
                    parameter.normal_(std=0.1)
                elif name.startswith("place_heads") and ".point." in name:
                    parameter.normal_(3.0, 0.5)  # out of the corner of the cell
                elif name.startswith("class_heads") and name.endswith(".4.bias"):
                    parameter.normal_(-2.0, 0.5)
                elif parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            for norm in detector.backbone.norms():
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.8, 1.2)
    return detector
