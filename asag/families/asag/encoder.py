"""Neck and encoder of ASAG-D (README, section 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from asag.families.asag.config import ASAGConfig
from asag.parts.deformable_layers import EncoderLayer, initialize_transformer
from asag.parts.layers import MapNorm
from asag.parts.levels import Levels

LEVELS = 4
"""P3 to P6."""


class NormedPyramid(nn.Module):
    """C3, C4, C5 [B, C_l, h_l, w_l] -> P3..P6 [B, C, h_l, w_l]: the top-down pyramid, and a convolution of 3x3 cells
    and stride 2 for another C5; a group norm ends each level.

    A norm's statistics are those of an image's whole map, padding included.
    """

    def __init__(self, inputs: Sequence[int], channels: int, groups: int) -> None:
        super().__init__()
        self.top_down = FeaturePyramidNetwork(list(inputs), channels)
        self.coarsest = nn.Conv2d(inputs[-1], channels, 3, stride=2, padding=1)
        self.norms = nn.ModuleList(MapNorm(groups, channels) for _ in range(LEVELS))
        nn.init.xavier_uniform_(self.coarsest.weight)
        assert self.coarsest.bias is not None
        nn.init.zeros_(self.coarsest.bias)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """By names: "P3", "P4" and "P5", and for the result "P6"."""
        found = {**self.top_down(maps), "P6": self.coarsest(maps["P5"])}
        return {name: norm(map_) for (name, map_), norm in zip(found.items(), self.norms, strict=True)}


class Encoder(nn.Module):
    """Every cell of four maps looks around on all of them, layer after layer; shapes stay (Deformable DETR, section
    4.1).

    It drops nothing in training: a step that is cut into pieces counts their patches in a pass of its own, which has to
    see the same maps.
    """

    def __init__(self, config: ASAGConfig) -> None:
        super().__init__()
        size = config.size
        widths = size.channels, size.attention_heads, LEVELS, size.attended_points, size.deformable_feed_forward
        self.level_embedding = nn.Parameter(torch.randn(LEVELS, size.channels))
        self.layers = nn.ModuleList(EncoderLayer(*widths, dropout=0.0) for _ in range(size.encoder_layers))
        initialize_transformer([self.layers])

    def forward(self, maps: Sequence[Tensor], levels: Levels) -> list[Tensor]:
        """maps: P3..P6, each [B, C, h, w], on which the content lies as `levels` say."""
        tokens, position = levels.flat(maps), levels.embedding(self.level_embedding)
        for layer in self.layers:
            tokens = layer(tokens, position, levels.centres, tokens, levels)
        return levels.maps(tokens)
