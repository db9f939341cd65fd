"""Salient points, the distances from them to the four sides, and where both lie on a padded map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from asag.families.sap_detr.config import SAPDETRConfig
from asag.parts.boxes import inverse_sigmoid
from asag.parts.positions import content_cells, sine_embedding

LEAST = 1e-3
"""What a fraction and its complement count as at least where their logit is taken."""

TEMPERATURE = 20.0
"""Of all sine embeddings (DETR's is 10000)."""


def logit(fractions: Tensor) -> Tensor:
    """Of fractions in 0..1, between those of 0.001 and 0.999."""
    return inverse_sigmoid(fractions, LEAST)


def grid_lines(count: int, device: torch.device | None = None) -> Tensor:
    """[count] where the points begin along an axis: `i / count`, but the first at `LEAST / (1 + LEAST)`, not 0."""
    return torch.arange(count, device=device).div(count).clamp(min=LEAST / (1 + LEAST))


def grid_points(config: SAPDETRConfig, device: torch.device | None = None) -> Tensor:
    """[N, 2] (x, y), the upper left corners of the grid's cells, row by row, as fractions of the content."""
    x, y = (grid_lines(count, device) for count in (config.columns, config.rows))
    return torch.stack((x.repeat(config.rows), y.repeat_interleave(config.columns)), dim=-1)


def moved_points(grid: Tensor, offsets: Tensor, config: SAPDETRConfig) -> Tensor:
    """A point stays in its cell of the grid: grid [N, 2] and offsets [..., N, 2], logits of shares of a cell -> points
    [..., N, 2], fractions of the content (section 3.2).
    """
    x, y = offsets.sigmoid().unbind(-1)
    return grid + torch.stack((x / config.columns, y / config.rows), dim=-1)


def boxes_of(points: Tensor, distances: Tensor) -> Tensor:
    """Points [..., 2] and distances [..., 4] to the left, top, right and bottom side -> `cxcywh` [..., 4]."""
    before, after = distances.split(2, dim=-1)
    return torch.cat((points + (after - before) / 2, before + after), dim=-1)


class Places(NamedTuple):
    """Where queries are; all are fractions of the content."""

    points: Tensor
    """[B, N, 2] (x, y)"""
    distances: Tensor
    """[B, N, 4], from the point to the left, top, right and bottom side."""
    boxes: Tensor
    """[B, N, 4] `cxcywh`, what both of them say."""

    @classmethod
    def of(cls, points: Tensor, distances: Tensor) -> Places:
        """With the boxes."""
        return cls(points, distances, boxes_of(points, distances))


def query_embedding(fractions: Tensor, channels: int) -> Tensor:
    """[..., k] -> [..., k * channels]: the sine embeddings of k coordinates, one after another."""
    return sine_embedding(fractions * math.tau, channels, TEMPERATURE).flatten(-2)


@dataclass(frozen=True)
class MapFrame:
    """How B images lie on a map of h x w cells."""

    rows: Tensor
    """[B, h] bool, those with content."""
    columns: Tensor
    """[B, w] bool, those with content."""
    span: Tensor
    """[B or 1, 2] float32, the columns and rows that fractions of the content span."""
    content_only: bool
    """Whether these are the ones with content (frame "content"), so that what lies outside is nothing."""
    pixels: tuple[float, float]
    """Width and height of a cell, in pixels of the input."""

    @classmethod
    def of(cls, frame: str, shape: tuple[int, int], sizes: Tensor, input_size: tuple[int, int]) -> MapFrame:
        """Of a map of `shape` (h, w) of an input with contents `sizes`, [B, 2] (height, width), both in pixels."""
        rows, columns = content_cells(sizes, input_size, shape)
        if frame == "content":
            span = torch.stack((columns.sum(1), rows.sum(1)), dim=-1).float()
        else:  # filled, not copied: a GPU would be waited for
            span = torch.cat([sizes.new_full((1, 1), float(side)) for side in reversed(shape)], dim=1)
        return cls(rows, columns, span, frame == "content", (input_size[1] / shape[1], input_size[0] / shape[0]))

    @property
    def valid(self) -> Tensor:
        """[B, h, w] bool, the cells with content."""
        return self.rows.unsqueeze(2) & self.columns.unsqueeze(1)

    def embedding(self, channels: int) -> Tensor:
        """Sine embedding of every cell, [B, h * w, channels]: y in the first half, x in the second.

        A cell counts the rows with content up to its own, the first one as 1, of all that its column has; so there is
        no y where a column has none, and no x where a row has none.
        """
        half = channels // 2
        y, x = (sine_embedding(_angles(cells), half, TEMPERATURE) for cells in (self.rows, self.columns))
        nothing = sine_embedding(self.span.new_zeros(1), half, TEMPERATURE)
        y = torch.where(self.columns[:, None, :, None], y.unsqueeze(2), nothing)
        x = torch.where(self.rows[:, :, None, None], x.unsqueeze(1), nothing)
        return torch.cat((y, x), dim=-1).flatten(1, 2)


def _angles(cells: Tensor) -> Tensor:
    """[B, n] bool -> [B, n] radians."""
    count = cells.sum(1, keepdim=True).float()
    number = torch.arange(1, cells.shape[1] + 1, device=cells.device)
    return torch.minimum(number, count) * math.tau / (count + 1e-6)
