"""What queries begin with: a map that is made of the encoder's, read at the points of the grid (section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag.families.sap_detr.config import SAPDETRConfig
from asag.families.sap_detr.geometry import MapFrame, grid_lines
from asag.parts.layers import MapNorm

CONVOLUTIONS = 3


class PointMap(nn.Module):
    """(3x3 convolution, group norm, ReLU) three times: [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, config: SAPDETRConfig) -> None:
        super().__init__()
        channels = config.size.channels
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(CONVOLUTIONS)]
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(MapNorm(config.size.norm_groups, channels) for _ in range(CONVOLUTIONS))
        for convolution in convolutions:
            nn.init.normal_(convolution.weight, std=0.01)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)

    def forward(self, map_: Tensor, frame: MapFrame) -> Tensor:
        """Of the frame "content" cells of the padding are zero, and outside of the norms' statistics."""
        inside = frame.valid.unsqueeze(1).to(map_.dtype) if frame.content_only else None
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            assert isinstance(norm, MapNorm)
            made = convolution(map_ if inside is None else map_ * inside)
            map_ = F.relu(norm(made) if inside is None else norm_inside(made, inside, norm))
        return map_


def norm_inside(map_: Tensor, inside: Tensor, norm: nn.GroupNorm) -> Tensor:
    """A group norm of [B, C, h, w] whose statistics are those of the cells where `inside` [B, 1, h, w] is 1."""
    apart = map_.unflatten(1, (norm.num_groups, -1))
    inside = inside.unsqueeze(1)
    count = inside.sum((2, 3, 4), keepdim=True) * apart.shape[2]

    def mean(values: Tensor) -> Tensor:
        return (values * inside).sum(4, keepdim=True).sum((2, 3), keepdim=True) / count

    centred = apart - mean(apart)
    normed = (centred * (mean(centred * centred) + norm.eps).rsqrt()).flatten(1, 2)
    return normed * norm.weight[:, None, None] + norm.bias[:, None, None]


def at_grid(map_: Tensor, frame: MapFrame, config: SAPDETRConfig) -> Tensor:
    """A map [B, C, h, w] read at the grid's points -> [B, N, C]; bilinear between the cells' centres, zero outside.

    The grid is one of rows and columns, so that two small matrix products do it.
    """
    x = _between(frame.span[:, 0], grid_lines(config.columns, map_.device), frame.columns, frame.content_only)
    y = _between(frame.span[:, 1], grid_lines(config.rows, map_.device), frame.rows, frame.content_only)
    found = y.unsqueeze(1) @ (map_ @ x.transpose(1, 2).unsqueeze(1))
    return found.flatten(2).transpose(1, 2)


def _between(span: Tensor, lines: Tensor, content: Tensor, content_only: bool) -> Tensor:
    """[B or 1, lines, cells], how much each cell along an axis counts for each line.

    span: [B or 1] cells that fractions span; lines: fractions; content: [B, cells] bool.
    """
    numbers = torch.arange(content.shape[1], device=content.device)
    places = span.unsqueeze(1) * lines - 0.5
    shares = (1 - (places.unsqueeze(2) - numbers).abs()).clamp(min=0)
    return shares * content.unsqueeze(1) if content_only else shares
