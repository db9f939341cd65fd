"""The neck: one width for all maps of the backbone (AdaMixer, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from asag.parts.layers import MapNorm


class ChannelNeck(nn.Module):
    """C2..C5 [B, C_l, H_l, W_l] -> P2..P5 [B, C, H_l, W_l]: a convolution of one cell each, then one norm for all.

    The norm is a group norm, so its statistics are those of an image's whole map, padding included.
    """

    def __init__(self, inputs: Sequence[int], channels: int, groups: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, channels, 1) for width in inputs]
        self.lateral = nn.ModuleList(convolutions)
        self.norm = MapNorm(groups, channels)
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Shapes as in the class."""
        return [self.norm(convolution(map_)) for convolution, map_ in zip(self.lateral, maps, strict=True)]
