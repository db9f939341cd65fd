"""The heads that tell classes and boxes (Deformable DETR, section A.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from asag.parts.layers import MLP

FIRST_PROBABILITY = 0.01
"""Of every class before training (Lin et al., "Focal Loss", section 4.1)."""


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
