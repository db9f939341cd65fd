"""The decoder's layers, and what tells classes, points and distances (sections 3.2 and 3.3)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag.families.sap_detr.config import SAPDETRConfig
from asag.families.sap_detr.encoder import Memory
from asag.families.sap_detr.gaussian import SideGaussian, gaussian_bias
from asag.families.sap_detr.geometry import Places, grid_points, logit, moved_points, query_embedding
from asag.parts.boxes import cxcywh_to_xyxy
from asag.parts.layers import MLP, FeedForward

FIRST_PROBABILITY = 0.01
"""Of every class, and of there being an object, before training (Lin et al., "Focal Loss", section 4.1)."""


class Embedded(NamedTuple):
    """Places as queries are told of them."""

    point_sines: Tensor
    """[B, N, C]"""
    box_sines: Tensor
    """[B, N, 2C]"""
    point: Tensor
    """[B, N, C]"""
    box: Tensor
    """[B, N, C]"""


class Placement(nn.Module):
    """How points and boxes tell queries their place; one for all layers."""

    def __init__(self, config: SAPDETRConfig) -> None:
        super().__init__()
        self.channels = config.size.channels
        self.point = MLP((self.channels,) * 3, "relu")
        self.box = MLP((2 * self.channels, self.channels, self.channels), "relu")
        self.scale = MLP((self.channels,) * 3, "relu")

    def forward(self, places: Places, queries: Tensor | None) -> Embedded:
        """queries: [B, N, C], what they hold weighs the sines; None for the first layer."""
        half = self.channels // 2
        point, box = query_embedding(places.points, half), query_embedding(cxcywh_to_xyxy(places.boxes), half)
        positions = self.point(point), self.box(box)
        if queries is not None:
            scale = self.scale(queries)
            point, box = point * scale, box * torch.cat((scale, scale), dim=-1)
        return Embedded(point, box, *positions)


class PlacedQueries(nn.Module):
    """A sum of three linear layers, of queries and of the positions of points and boxes, each [B, N, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.content, self.point, self.box = (nn.Linear(channels, channels) for _ in range(3))

    def forward(self, queries: Tensor, point: Tensor, box: Tensor) -> Tensor:
        """All [B, N, C] -> [B, N, C]."""
        return self.content(queries) + self.point(point) + self.box(box)


def _by_head(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]"""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


class QueryAttention(nn.Module):
    """Queries [B, N, C] see one another, with positions of their points and boxes."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = PlacedQueries(channels), PlacedQueries(channels)
        self.value, self.output_projection = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, queries: Tensor, point: Tensor, box: Tensor) -> Tensor:
        """All [B, N, C] -> [B, N, C]."""
        parts = (self.query(queries, point, box), self.key(queries, point, box), self.value(queries))
        query, key, value = (_by_head(part, self.heads) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.output_projection(attended.transpose(1, 2).flatten(2))


class MapAttention(nn.Module):
    """Queries [B, N, C] see the memory, where their Gaussians point.

    first: the positions of queries and cells are part of their content, too. As published a head's keys have three
    parts, of which two are the same positions; here they are one, which the sum of the queries' two parts meets.
    """

    def __init__(self, channels: int, heads: int, first: bool) -> None:
        super().__init__()
        self.heads, self.first = heads, first
        self.query: nn.Module = PlacedQueries(channels) if first else nn.Linear(channels, channels)
        self.query_point, self.query_box = nn.Linear(channels, channels), nn.Linear(2 * channels, channels)
        self.key, self.key_position, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.output_projection = nn.Linear(channels, channels)

    def forward(self, queries: Tensor, placed: Embedded, memory: Tensor, position: Tensor, bias: Tensor) -> Tensor:
        """memory, position: [B, T, C]; bias: [B, heads, N, T], added to the scores."""
        content = self.query(queries, placed.point, placed.box) if self.first else self.query(queries)
        sines = self.query_point(placed.point_sines) + self.query_box(placed.box_sines)
        key_position = self.key_position(position)
        key = self.key(memory) + key_position if self.first else self.key(memory)
        query = torch.cat([_by_head(part, self.heads) for part in (content, sines)], dim=-1)
        keys = torch.cat([_by_head(part, self.heads) for part in (key, key_position)], dim=-1)
        values = _by_head(self.value(memory), self.heads)
        scale = 1 / math.sqrt(3 * values.shape[-1])
        attended = F.scaled_dot_product_attention(query, keys, values, bias, scale=scale)
        return self.output_projection(attended.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Queries see one another, then the memory: [B, N, C] -> [B, N, C]."""

    def __init__(self, config: SAPDETRConfig, first: bool) -> None:
        super().__init__()
        size = config.size
        self.first = first
        self.self_attention = QueryAttention(size.channels, size.attention_heads)
        self.self_attention_norm = nn.LayerNorm(size.channels)
        self.gaussian = SideGaussian(size.channels, size.attention_heads)
        self.cross_attention = MapAttention(size.channels, size.attention_heads, first)
        self.cross_attention_norm = nn.LayerNorm(size.channels)
        self.feed_forward = FeedForward(size.channels, size.feed_forward, "relu")

    def attend(self, queries: Tensor, places: Places, placement: Placement) -> tuple[Tensor, Embedded]:
        """Queries see one another; also returns their places as :meth:`look` takes them."""
        placed = placement(places, None if self.first else queries)
        attended = self.self_attention(queries, placed.point, placed.box)
        return self.self_attention_norm(queries + attended), placed

    def look(self, queries: Tensor, gaussians: Tensor, placed: Embedded, memory: Memory) -> Tensor:
        """Queries see the memory. gaussians: [B, N, heads, 4]."""
        bias = gaussian_bias(gaussians, memory.frame)
        found = self.cross_attention(queries, placed, memory.tokens, memory.position, bias)
        return self.feed_forward(self.cross_attention_norm(queries + found))


class PlaceHead(nn.Module):
    """Moves the points of queries [B, N, C], and their sides; of one decoder layer."""

    def __init__(self, config: SAPDETRConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.size.channels
        self.point = MLP((channels, channels, channels, 2), "relu")
        self.distances = MLP((channels, channels, channels, 4), "relu")
        for branch in (self.point, self.distances):
            for parameter in branch[-1].parameters():
                nn.init.zeros_(parameter)

    def points(self, queries: Tensor, points: Tensor) -> Tensor:
        """points: [B, N, 2] -> [B, N, 2].

        The offset in the cell counts as a fraction of the content, not of the cell, as trained weights expect it.
        """
        grid = grid_points(self.config, points.device)
        return moved_points(grid, self.point(queries) + logit(points - grid), self.config)

    def sides(self, queries: Tensor, distances: Tensor) -> Tensor:
        """distances: [B, N, 4] -> [B, N, 4]."""
        return (self.distances(queries) + logit(distances)).sigmoid()

    def moved(self, queries: Tensor, places: Places) -> Places:
        """Where the next layer begins."""
        return Places.of(self.points(queries, places.points), self.sides(queries, places.distances))


class ClassHead(nn.Sequential):
    """Class logits of queries, [B, N, C] -> [B, N, classes]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(*MLP((channels, channels, channels, classes), "relu"))
        last = self[-1]
        assert isinstance(last, nn.Linear)
        start_rare(last)


def start_rare(layer: nn.Linear) -> None:
    """Let everything be as probable as an object is before training."""
    nn.init.constant_(layer.bias, -math.log(1 / FIRST_PROBABILITY - 1))
