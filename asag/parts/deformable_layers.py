"""Layers of encoders and decoders with deformable attention (Deformable DETR, sections 4.1, A.2 and A.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from asag.parts.deformable_attention import DeformableAttention, Sampling
from asag.parts.layers import FeedForward, PlacedSelfAttention
from asag.parts.levels import Levels
from asag.parts.positions import sine_embedding


class EncoderLayer(nn.Module):
    """Tokens [B, N, C] look at the memory's places around their own -> [B, N, C].

    heads look at `points` places on each of `levels` maps; feed_forward: width of the perceptron; dropout: in training.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels, heads, levels, points)
        self.attention_norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, feed_forward, "relu", dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, position: Tensor, centres: Tensor, memory: Tensor, levels: Levels) -> Tensor:
        """position: [B, N, C]; centres: [B, N, 2], fractions of the content; memory: [B, T, C]."""
        found, _ = self.attention(tokens + position, centres, memory, levels)
        return self.feed_forward(self.attention_norm(tokens + self.dropout(found)))


class DecoderLayer(nn.Module):
    """Queries [B, N, C] see one another, then the memory -> [B, N, C]; arguments as of :class:`EncoderLayer`."""

    def __init__(self, channels: int, heads: int, levels: int, points: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = PlacedSelfAttention(channels, heads, dropout)
        self.self_attention_norm = nn.LayerNorm(channels)
        self.cross_attention = DeformableAttention(channels, heads, levels, points)
        self.cross_attention_norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, feed_forward, "relu", dropout)
        self.dropout = nn.Dropout(dropout)

    def attend(self, queries: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries of an image see one another: both [B, N, C] -> [B, N, C].

        mask: as in :class:`asag.parts.layers.SelfAttention`.
        """
        return self.self_attention_norm(queries + self.dropout(self.self_attention(queries, position, mask)))

    def look(
        self, queries: Tensor, position: Tensor, references: Tensor, memory: Tensor, levels: Levels
    ) -> tuple[Tensor, Sampling]:
        """What follows, of every query alone; arguments as in :meth:`forward`."""
        sampling = self.sampling(queries, position, references, levels)
        return self.gather(queries, sampling, memory, levels), sampling

    def sampling(self, queries: Tensor, position: Tensor, references: Tensor, levels: Levels) -> Sampling:
        """Where the queries look; arguments as in :meth:`forward`."""
        return self.cross_attention.sampling(queries + position, references, levels)

    def gather(self, queries: Tensor, sampling: Sampling, memory: Tensor, levels: Levels) -> Tensor:
        """The queries with what the memory has there, [B, N, C]."""
        found = self.cross_attention.gather(sampling, memory, levels)
        return self.feed_forward(self.cross_attention_norm(queries + self.dropout(found)))

    def forward(
        self, queries: Tensor, position: Tensor, references: Tensor, memory: Tensor, levels: Levels
    ) -> tuple[Tensor, Sampling]:
        """position: [B, N, C]; references: [B, N, 2 or 4], fractions of the content; memory: [B, T, C].

        Also returns where the queries looked.
        """
        return self.look(self.attend(queries, position), position, references, memory, levels)


class BoxEmbedding(nn.Module):
    """What a query knows of the box it begins with: [B, N, 4] `cxcywh` fractions -> [B, N, outputs]."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.channels = channels
        self.projection = nn.Linear(2 * channels, outputs)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, boxes: Tensor) -> Tensor:
        """Half of the channels' number for each of the four, a turn of 2 pi from 0 to 1."""
        sines = sine_embedding(boxes * (2 * math.pi), self.channels // 2).flatten(-2)
        return self.norm(self.projection(sines))


def initialize_transformer(parts: Sequence[nn.Module]) -> None:
    """Matrices by Glorot's rule, then deformable attention as it has to begin."""
    for part in parts:
        for parameter in part.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
    for part in parts:
        for module in part.modules():
            if isinstance(module, DeformableAttention):
                module.initialize()
