"""The neck: four maps of one width (Deformable DETR, section A.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class LevelNeck(nn.Module):
    """C3, C4, C5 [B, C_l, h_l, w_l] -> P3..P6 [B, C, h_l, w_l]: a convolution of one cell for each of them, one of
    3x3 cells and stride 2 for another C5, and a group norm for each level.

    A norm's statistics are those of an image's whole map, padding included.
    """

    def __init__(self, inputs: Sequence[int], channels: int, groups: int, bias: bool) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, channels, 1, bias=bias) for width in inputs]
        convolutions.append(nn.Conv2d(inputs[-1], channels, 3, stride=2, padding=1, bias=bias))
        self.levels = nn.ModuleList(nn.Sequential(each, nn.GroupNorm(groups, channels)) for each in convolutions)
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Shapes as in the class."""
        return [level(map_) for level, map_ in zip(self.levels, (*maps, maps[-1]), strict=True)]
