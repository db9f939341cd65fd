"""Maps of several levels as one list of tokens, and where the content of each image lies on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asag.parts.positions import content_cells, map_embedding

LevelShapes = tuple[tuple[int, int], ...]
"""(height, width) of each level's map, fine to coarse."""


@dataclass(frozen=True)
class Levels:
    """B images on L levels of T cells in all, row by row, one level after another."""

    shapes: LevelShapes
    cells: Tensor
    """[L, 2] (w, h) of each level's map, float32."""
    content: tuple[tuple[Tensor, Tensor], ...]
    """For each level the rows [B, h] and the columns [B, w] with content, bool."""
    ratios: Tensor
    """[B, L, 2] (w, h), the share of the columns and of the rows with content."""
    padded: Tensor
    """[B, T] bool, the cells without content."""
    centres: Tensor
    """[B, T, 2] (x, y), centres of the cells as fractions of the content; of padding they are above 1."""

    @classmethod
    def of(cls, shapes: LevelShapes, sizes: Tensor, input_size: tuple[int, int]) -> Levels:
        """Of maps of an input whose contents are `sizes`, [B, 2] (height, width) in pixels."""
        content = tuple(content_cells(sizes, input_size, shape) for shape in shapes)
        counts = torch.stack([torch.stack((x.sum(1), y.sum(1)), dim=-1) for y, x in content], dim=1).float()
        # Filled, not copied: a GPU would be waited for.
        sides = [torch.full((), float(side), device=sizes.device) for shape in shapes for side in reversed(shape)]
        cells = torch.stack(sides).reshape(-1, 2)
        padded = torch.cat([~(y.unsqueeze(2) & x.unsqueeze(1)).flatten(1) for y, x in content], dim=1)
        grid = torch.cat([_centres(shape, sizes.device) for shape in shapes])
        lengths = [height * width for height, width in shapes]
        of_token = torch.cat([counts[:, i : i + 1].expand(-1, n, -1) for i, n in enumerate(lengths)], dim=1)
        return cls(shapes, cells, content, counts / cells, padded, grid / of_token)

    def flat(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, C, h, w] -> tokens [B, T, C]."""
        return torch.cat([map_.flatten(2).transpose(1, 2) for map_ in maps], dim=1)

    def maps(self, tokens: Tensor) -> list[Tensor]:
        """Tokens [B, T, C] -> maps [B, C, h, w]."""
        parts = tokens.split([height * width for height, width in self.shapes], dim=1)
        return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def embedding(self, of_level: Tensor) -> Tensor:
        """[L, C], a vector for every level -> [B, T, C], with the sine embedding of every cell added."""
        parts = [map_embedding(*content, of_level.shape[1]).flatten(1, 2) for content in self.content]
        return torch.cat([part + own for part, own in zip(parts, of_level, strict=True)], dim=1)

    def on_maps(self, places: Tensor) -> Tensor:
        """Points or `cxcywh` boxes [B, N, 2 or 4], fractions of the content -> [B, N, L, 2 or 4], of padded maps."""
        ratios = self.ratios.repeat(1, 1, places.shape[-1] // 2)
        return places.unsqueeze(2) * ratios.unsqueeze(1)


def levels_of(maps: Sequence[Tensor], sizes: Tensor, images: Tensor) -> Levels:
    """Where the contents, `sizes` [B, 2] in pixels, lie on the maps of `images`."""
    shapes = tuple((map_.shape[-2], map_.shape[-1]) for map_ in maps)
    return Levels.of(shapes, sizes, (images.shape[-2], images.shape[-1]))


def _centres(shape: tuple[int, int], device: torch.device) -> Tensor:
    """[h * w, 2] (x, y), centres of a map's cells in cells."""
    height, width = shape
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    return torch.stack((x, y), dim=-1) + 0.5
