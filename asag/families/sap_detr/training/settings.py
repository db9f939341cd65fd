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

    def __post_init__(self) -> None:
        if not 0 < self.distances_rate < math.inf:
            raise ValueError(f"distances_rate is {self.distances_rate:g}; it is a factor above 0")
