"""The encoder: every cell of the map attends to all cells with content (DETR; Conditional DETR's scaled positions)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asag.families.sap_detr.config import SAPDETRConfig
from asag.families.sap_detr.geometry import MapFrame
from asag.parts.layers import MLP, FeedForward, PlacedSelfAttention


@dataclass(frozen=True)
class Memory:
    """What the decoder looks at."""

    tokens: Tensor
    """[B, h * w, C]"""
    position: Tensor
    """[B, h * w, C]"""
    frame: MapFrame


class EncoderLayer(nn.Module):
    """Cells [B, T, C] -> [B, T, C]; what a cell holds decides how its position is weighed."""

    def __init__(self, config: SAPDETRConfig) -> None:
        super().__init__()
        size = config.size
        self.position_scale = MLP((size.channels,) * 3, "relu")
        self.attention = PlacedSelfAttention(size.channels, size.attention_heads)
        self.attention_norm = nn.LayerNorm(size.channels)
        self.feed_forward = FeedForward(size.channels, size.feed_forward, "relu")

    def forward(self, cells: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """position: [B, T, C]; mask: [B, 1, 1, T], added to the scores."""
        found = self.attention(cells, position * self.position_scale(cells), mask)
        return self.feed_forward(self.attention_norm(cells + found))


class Encoder(nn.Module):
    """A map [B, C, h, w] -> memory. Cells of the padding are no keys, but change like the others."""

    def __init__(self, config: SAPDETRConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.size.encoder_layers))

    def forward(self, map_: Tensor, frame: MapFrame) -> Memory:
        """Shapes as in the classes."""
        position = frame.embedding(map_.shape[1])
        cells = map_.flatten(2).transpose(1, 2)
        padded = ~frame.valid.flatten(1)[:, None, None]
        # Finite, so that engines of half precision compute no infinity minus infinity.
        mask = torch.zeros_like(padded, dtype=cells.dtype).masked_fill(padded, torch.finfo(cells.dtype).min)
        for layer in self.layers:
            cells = layer(cells, position, mask)
        return Memory(cells, position, frame)
