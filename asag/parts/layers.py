"""Small parts of decoders on queries: perceptrons, attention that knows where boxes are, output branches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag.parts.boxes import cxcywh_to_xyxy, intersection_over_foreground
from asag.parts.xyzr import position_embedding

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
"""The activations that layers are made with, by name; the GELU is the exact one."""


class MLP(nn.Sequential):
    """Linear layers of the given widths with an activation between them: [..., widths[0]] -> [..., widths[-1]]."""

    def __init__(self, widths: Sequence[int], activation: str = "gelu") -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
        super().__init__(*layers[:-1])


def branch(channels: int, depth: int, activation: str = "gelu", bias: bool = False) -> nn.Sequential:
    """(Linear, LayerNorm, activation) `depth` times: [..., C] -> [..., C]."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(channels, channels, bias=bias), nn.LayerNorm(channels), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class MapNorm(nn.GroupNorm):
    """A group norm of maps [B, C, H, W].

    Of maps whose channels lie side by side, PyTorch takes the sums on a CPU one cell after another in float32, which
    leaves four digits of them in a map of 200 x 304 cells.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Shape stays."""
        return super().forward(maps.contiguous())


class SelfAttention(nn.Module):
    """Multi-head self-attention, [B, N, C] -> [B, N, C].

    `mask` [B, 1 or heads, N, N] float is added to the scores; a row of it must not be minus infinity throughout.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_projection = nn.Linear(channels, 3 * channels)
        self.out_projection = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens: [B, N, C]; mask: [B, 1 or heads, N, N] -> [B, N, C]."""
        batch, count, channels = tokens.shape
        qkv = self.in_projection(tokens).reshape(batch, count, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_projection(attended.transpose(1, 2).reshape(batch, count, channels))


class PlacedSelfAttention(nn.Module):
    """Multi-head self-attention in which queries and keys know their place and values do not, [B, N, C] -> [B, N, C].

    dropout: of the attention's weights (Carion et al., "End-to-End Object Detection with Transformers", section A.3).
    """

    def __init__(self, channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.output_projection = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, tokens: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        """Both [B, N, C]; the position is added to what queries and keys are made of.

        mask: as in :class:`SelfAttention`.
        """
        placed = tokens + position
        parts = (self.query(placed), self.key(placed), self.value(tokens))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropped = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, mask, dropped)
        return self.output_projection(attended.transpose(1, 2).flatten(2))


def exclude(bias: Tensor, allowed: Tensor) -> Tensor:
    """Bias [B, H, N, N] with the lowest finite number where `allowed` ([B, 1, N or 1, N] bool) is false.

    Finite, so that a row without any allowed key stays a number.
    """
    return bias.masked_fill(~allowed, torch.finfo(bias.dtype).min)


class GeometryAttention(nn.Module):
    """Self-attention that knows where the boxes are: queries [B, N, C] -> [B, N, C] (AdaMixer, section 3.4).

    `a = q + pe(xyzr)`; scores get `tau * log(iof + 1e-7)` per head; the result is `LN(attention(a) + a)`.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(channels, heads)
        self.tau = nn.Parameter(torch.linspace(0.0, 4.0, heads))
        self.norm = nn.LayerNorm(channels)

    def forward(self, queries: Tensor, xyzr: Tensor, boxes: Tensor, allowed: Tensor | None = None) -> Tensor:
        """xyzr: [B, N, 4]; boxes: the same [B, N, 4] as `cxcywh` in the unit of `xyzr`; allowed: [B, 1, N or 1, N]
        bool, which keys a query may attend to, None for all.
        """
        queries = queries + position_embedding(xyzr, queries.shape[-1])
        overlap = intersection_over_foreground(cxcywh_to_xyxy(boxes))
        bias = self.tau[:, None, None] * torch.log(overlap + 1e-7).unsqueeze(1)
        if allowed is not None:
            bias = exclude(bias, allowed)
        return self.norm(self.attention(queries, bias) + queries)


class FeedForward(nn.Module):
    """`LN(q + MLP(q))`: [B, N, C] -> [B, N, C]; dropout: after the activation and after the second layer."""

    def __init__(self, channels: int, hidden: int, activation: str = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        self.mlp = MLP((channels, hidden, channels), activation)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        expand, activation, contract = self.mlp
        hidden = self.dropout(activation(expand(queries)))
        return self.norm(queries + self.dropout(contract(hidden)))


class Branches(nn.Module):
    """Class logits [B, N, classes] and box deltas [B, N, 4] of queries [B, N, C].

    box_depth: how many linear layers precede the one that gives the deltas; bias: whether those layers have one.
    """

    def __init__(
        self, channels: int, classes: int, box_depth: int = 3, activation: str = "gelu", bias: bool = False
    ) -> None:
        super().__init__()
        self.class_branch = branch(channels, 1, activation, bias)
        self.class_logits = nn.Linear(channels, classes)
        self.box_branch = branch(channels, box_depth, activation, bias)
        self.box_deltas = nn.Linear(channels, 4)
        # Rare positives: every class starts at probability 0.01 (Lin et al., "Focal Loss", section 4.1).
        nn.init.constant_(self.class_logits.bias, -4.595)
        nn.init.zeros_(self.box_deltas.weight)
        nn.init.zeros_(self.box_deltas.bias)

    def logits(self, queries: Tensor) -> Tensor:
        """[B, N, C] -> class logits [B, N, classes]."""
        return self.class_logits(self.class_branch(queries))

    def deltas(self, queries: Tensor) -> Tensor:
        """[B, N, C] -> box deltas [B, N, 4]."""
        return self.box_deltas(self.box_branch(queries))

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, C] -> class logits [B, N, classes] and box deltas [B, N, 4]."""
        return self.logits(queries), self.deltas(queries)
