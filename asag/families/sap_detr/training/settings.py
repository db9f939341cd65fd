"""What only SAP-DETR's training has, as frozen data."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SAPDETRSettings:
    """Fields of a training configuration beside those of every family."""

    distances_rate: float = 1.0
    """Learning rate of the distances that queries begin with, over the general one. They begin anywhere, and a short
    training at the general rate has no time to move them: what is left of their start the layers have to undo."""
    class_weight: float = 1.0
    """Weight of the loss of classes. What a backbone without pretraining learns of classes comes from this loss alone,
    which is a small one beside those of boxes."""

    def __post_init__(self) -> None:
        for name in ("distances_rate", "class_weight"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {value:g}; it is a factor above 0")
