"""The maps that anchors, proposals and heads look at."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from asag.ops import pyramid_roi_align
from asag.parts.levels import Levels

COARSEST = 5
"""The level of the last map that boxes take their features from; its stride is 2 to this power."""


class Pyramid(NamedTuple):
    """Maps from fine to coarse, each at twice the stride of the one before."""

    maps: list[Tensor]
    """[B, C, H, W] each."""
    first: int
    """Level of the first map; its stride is 2 to this power."""
    levels: Levels | None = None
    """Where the content lies on the maps, for a decoder that asks."""

    def level(self, name: str) -> Tensor:
        """The map of "P3", "P4" or "P5"."""
        return self.maps[int(name[1:]) - self.first]

    def rois(self, boxes: Tensor) -> Tensor:
        """[B, N, 4] `cxcywh` in pixels -> features of each on the level up to P5 that fits it, [B, N, C, 7, 7]."""
        return pyramid_roi_align(self.maps[: COARSEST + 1 - self.first], boxes, 1 << self.first)
