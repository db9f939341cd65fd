"""Tokens as proposals (Deformable DETR, section A.4): what queries of two stages, and kept tokens, are chosen from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from asag.parts.levels import Levels
from asag.parts.positions import sine_embedding

SIDE = 0.05
"""Of the finest level's proposals, as a share of the content; each level doubles it."""
MARGIN = 0.01
"""A proposal's numbers lie between this and 1 minus this, or its token is not usable."""
UNUSABLE = 50.0
"""The logit of numbers that are not: its sigmoid is 1 in float32."""


def proposal_boxes(levels: Levels) -> tuple[Tensor, Tensor]:
    """A box around every token, as logits [B, T, 4] of `cxcywh` fractions of the content; usable: [B, T] bool."""
    lengths = [height * width for height, width in levels.shapes]
    sides = torch.cat([torch.full_like(levels.centres[:, :n], SIDE * 2**i) for i, n in enumerate(lengths)], dim=1)
    boxes = torch.cat((levels.centres, sides), dim=-1)
    usable = ((boxes > MARGIN) & (boxes < 1 - MARGIN)).all(-1) & ~levels.padded
    safe = boxes.clamp(MARGIN, 1 - MARGIN)
    return torch.where(usable.unsqueeze(-1), (safe / (1 - safe)).log(), UNUSABLE), usable


def best_first(ranking: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the largest of `ranking` [B, T]; among equals the lower index comes first.

    All tokens that are not usable are equal here, and one of them is chosen where the usable ones do not suffice. Every
    backend has to choose the same: ONNX defines its TopK so, PyTorch's chooses any.
    """
    if torch.compiler.is_exporting():
        return ranking.topk(count, dim=1).indices
    return ranking.sort(dim=1, descending=True, stable=True).indices[:, :count]


class Candidates(nn.Module):
    """Tokens [B, T, C] as a head sees them; those that are not usable count as zeros."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor, usable: Tensor) -> Tensor:
        """usable: [B, T] bool."""
        return self.norm(self.projection(tokens.masked_fill(~usable.unsqueeze(-1), 0.0)))


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
