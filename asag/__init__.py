"""ASAG: a one-decoder-layer detector with adaptive sparse anchors, as a PyTorch library.

Names that need PyTorch are imported when first used, so that configuration and presets stay quick to read.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from asag.config import DetectorConfig, ModelSize
from asag.presets import PRESETS, Preset, find_preset

if TYPE_CHECKING:
    from asag.checkpoint import CheckpointInfo, load_detector, save_detector
    from asag.deploy import DeployedDetector
    from asag.detector import Detector, build_detector
    from asag.published import load_published

__version__ = "0.1.0"

_NEEDS_TORCH = {
    "CheckpointInfo": "asag.checkpoint",
    "load_detector": "asag.checkpoint",
    "save_detector": "asag.checkpoint",
    "DeployedDetector": "asag.deploy",
    "Detector": "asag.detector",
    "build_detector": "asag.detector",
    "load_published": "asag.published",
}

__all__ = [
    "PRESETS",
    "CheckpointInfo",
    "DeployedDetector",
    "Detector",
    "DetectorConfig",
    "ModelSize",
    "Preset",
    "build_detector",
    "find_preset",
    "load_detector",
    "load_published",
    "save_detector",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        return getattr(importlib.import_module(_NEEDS_TORCH[name]), name)
    raise AttributeError(f"module 'asag' has no attribute {name!r}")
