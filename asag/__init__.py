"""Detectors of several families as a PyTorch library.

Names that need PyTorch are imported when first used, so that configurations and presets stay quick to read.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asag.checkpoint import CheckpointInfo, load_detector, save_detector
    from asag.deploy import DeployedDetector
    from asag.detector import Detector, Predictions, build_detector, recorded
    from asag.families import FAMILIES, all_presets, find_preset
    from asag.published import load_published

__version__ = "0.1.0"

_HOMES = {
    "FAMILIES": "asag.families",
    "all_presets": "asag.families",
    "find_preset": "asag.families",
    "CheckpointInfo": "asag.checkpoint",
    "load_detector": "asag.checkpoint",
    "save_detector": "asag.checkpoint",
    "DeployedDetector": "asag.deploy",
    "Detector": "asag.detector",
    "Predictions": "asag.detector",
    "build_detector": "asag.detector",
    "recorded": "asag.detector",
    "load_published": "asag.published",
}

__all__ = [
    "FAMILIES",
    "CheckpointInfo",
    "DeployedDetector",
    "Detector",
    "Predictions",
    "all_presets",
    "build_detector",
    "find_preset",
    "load_detector",
    "load_published",
    "recorded",
    "save_detector",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'asag' has no attribute {name!r}")
