"""The decoder's layers, and the heads that tell classes and boxes (Deformable DETR, sections 4.1 and A.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from asag.families.deformable.config import LEVELS, DeformableConfig
from asag.parts.deformable_attention import DeformableAttention, Sampling
from asag.parts.layers import MLP, FeedForward, PlacedSelfAttention
from asag.parts.levels import Levels

FIRST_PROBABILITY = 0.01
"""Of every class before training (Lin et al., "Focal Loss", section 4.1)."""


class DecoderLayer(nn.Module):
    """Queries [B, N, C] see one another, then the memory -> [B, N, C]."""

    def __init__(self, config: DeformableConfig) -> None:
        super().__init__()
        size = config.size
        self.self_attention = PlacedSelfAttention(size.channels, size.attention_heads, config.dropout)
        self.self_attention_norm = nn.LayerNorm(size.channels)
        self.cross_attention = DeformableAttention(size.channels, size.attention_heads, LEVELS, size.points)
        self.cross_attention_norm = nn.LayerNorm(size.channels)
        self.feed_forward = FeedForward(size.channels, size.feed_forward, "relu", config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def attend(self, queries: Tensor, position: Tensor) -> Tensor:
        """Queries of an image see one another: both [B, N, C] -> [B, N, C]."""
        return self.self_attention_norm(queries + self.dropout(self.self_attention(queries, position)))

    def look(
        self, queries: Tensor, position: Tensor, references: Tensor, memory: Tensor, levels: Levels
    ) -> tuple[Tensor, Sampling]:
        """What follows, of every query alone; arguments as in :meth:`forward`."""
        found, sampling = self.cross_attention(queries + position, references, memory, levels)
        return self.feed_forward(self.cross_attention_norm(queries + self.dropout(found))), sampling

    def forward(
        self, queries: Tensor, position: Tensor, references: Tensor, memory: Tensor, levels: Levels
    ) -> tuple[Tensor, Sampling]:
        """position: [B, N, C]; references: [B, N, 2 or 4], fractions of the content; memory: [B, T, C].

        Also returns where the queries looked.
        """
        return self.look(self.attend(queries, position), position, references, memory, levels)


class Head(nn.Module):
    """Class logits [B, N, classes] and boxes of queries or tokens [B, N, C]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.class_logits = nn.Linear(channels, classes)
        self.box_deltas = MLP((channels, channels, channels, 4), "relu")
        nn.init.constant_(self.class_logits.bias, -math.log(1 / FIRST_PROBABILITY - 1))
        for parameter in self.box_deltas[-1].parameters():
            nn.init.zeros_(parameter)

    def start_small(self) -> None:
        """Let the boxes around points begin with a tenth of the content's sides."""
        last = self.box_deltas[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias[2:], -2.0)

    def logits(self, queries: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, classes]."""
        return self.class_logits(queries)

    def boxes(self, queries: Tensor, references: Tensor) -> Tensor:
        """references: [B, N, 2 or 4], logits of points or boxes -> [B, N, 4] `cxcywh`, fractions of the content.

        A point has no size to begin with.
        """
        deltas = self.box_deltas(queries)
        if references.shape[-1] == 2:
            return torch.cat((deltas[..., :2] + references, deltas[..., 2:]), dim=-1).sigmoid()
        return (deltas + references).sigmoid()
