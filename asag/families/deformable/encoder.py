"""The encoder: every token, or the most useful ones (Sparse DETR, sections 3.1 and 3.2), look around on the maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag.families.deformable.config import LEVELS, DeformableConfig
from asag.ops import select_tokens
from asag.parts.deformable_layers import EncoderLayer
from asag.parts.levels import Levels


@dataclass(frozen=True)
class Kept:
    """The tokens that a sparse encoder refines, in K places."""

    indices: Tensor
    """[B, K] int64, distinct."""
    active: Tensor
    """[B, K] bool, False for places that an image does not need."""

    def of(self, tokens: Tensor) -> Tensor:
        """[B, T, C] -> the kept tokens [B, K, C]."""
        return tokens.gather(1, self.indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))

    def put(self, memory: Tensor, tokens: Tensor) -> Tensor:
        """`memory` [B, T, C] with `tokens` [B, K, C] in the active places."""
        tokens = torch.where(self.active.unsqueeze(-1), tokens, self.of(memory))
        return memory.scatter(1, self.indices.unsqueeze(-1).expand_as(tokens), tokens)


class Encoder(nn.Module):
    """Normed maps as tokens, `source` [B, T, C] -> memory [B, T, C]."""

    def __init__(self, config: DeformableConfig) -> None:
        super().__init__()
        size = config.size
        widths = size.channels, size.attention_heads, LEVELS, size.points, size.feed_forward
        self.layers = nn.ModuleList(EncoderLayer(*widths, config.dropout) for _ in range(size.encoder_layers))

    def forward(
        self, source: Tensor, position: Tensor, levels: Levels, kept: Kept | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """position: [B, T, C]; kept: which tokens pass the layers, None for all.

        Kept tokens are a stream of their own that sees the memory, which gets them back after each layer. Also returns
        the stream after each layer, [B, K or T, C].
        """
        centres, tokens, memory = levels.centres, source, source
        if kept is not None:
            centres, position, tokens = kept.of(centres), kept.of(position), kept.of(source)
        stream = []
        for layer in self.layers:
            tokens = layer(tokens, position, centres, memory, levels)
            memory = tokens if kept is None else kept.put(memory, tokens)
            stream.append(tokens)
        return memory, stream


class TokenScorer(nn.Module):
    """How much the decoder will look at each token: candidates [B, T, C] -> logits [B, T].

    Half of the channels is replaced by its mean over all tokens of the image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mix = nn.Linear(channels, channels)
        self.score = nn.Sequential(
            nn.Linear(channels, channels // 2),
            nn.GELU(),
            nn.Linear(channels // 2, channels // 4),
            nn.GELU(),
            nn.Linear(channels // 4, 1),
        )

    def forward(self, candidates: Tensor, padded: Tensor) -> Tensor:
        """padded: [B, T] bool, tokens without content; they get the smallest logit of the batch."""
        local, shared = F.gelu(self.mix(self.norm(candidates))).chunk(2, dim=-1)
        shared = shared.mean(1, keepdim=True).expand_as(shared)
        scores = self.score(torch.cat((local, shared), dim=-1)).squeeze(-1)
        return torch.where(padded, scores.min(), scores)


def kept_counts(padded: Tensor, ratio: float) -> Tensor:
    """[B, T] bool -> [B] int64, how many of each image's tokens with content are kept."""
    return ((~padded).sum(1).float() * ratio).long() + 1


def keep_best(scores: Tensor, padded: Tensor, ratio: float) -> Kept:
    """The tokens with the largest scores [B, T], in as many places as an image that fills the input needs.

    Padding comes after all content: its scores are the batch's smallest, which a token with content may have as well.
    """
    tokens = scores.shape[1]
    scores = scores.masked_fill(padded, -torch.inf)
    # As float32 has it, like the counts.
    capacity = min(int(np.float32(tokens) * np.float32(ratio)) + 1, tokens)
    return Kept(*select_tokens(scores, kept_counts(padded, ratio), capacity))
