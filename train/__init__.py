"""Training of the sparse detector: data, assignment, losses, denoising, schedules, the loop and its evaluation.

Importing this package imports no PyTorch; its names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["DetectionCriterion"]

_HOMES = {"DetectionCriterion": "train.criterion"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
