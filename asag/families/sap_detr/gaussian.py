"""The side-directed Gaussian: every head of a query looks towards one side of its box (section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asag.families.sap_detr.geometry import MapFrame, Places
from asag.parts.layers import MLP


class SideGaussian(nn.Module):
    """Where each head of the queries [B, N, C] looks, [B, N, heads, 4]: the centre (x, y) in pixels of the input, and
    how many standard deviations of either axis a pixel is (of any sign).
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projection = MLP((channels, channels, channels, 4 * heads), "relu")

    def forward(self, queries: Tensor, places: Places, frame: MapFrame) -> Tensor:
        """Shapes as in the class."""
        offsets, scales = self.projection(queries).unflatten(-1, (2, self.heads, 2)).unbind(2)
        offsets = offsets.tanh()
        before, after = places.distances.unsqueeze(2).split(2, dim=-1)
        reach = torch.where(offsets >= 0, after, before)
        pixels = torch.cat([frame.span.new_full((1,), side) for side in frame.pixels])
        centre = (places.points.unsqueeze(2) + offsets * reach) * (frame.span * pixels)[:, None, None]
        return torch.cat((centre, scales / (2 * pixels)), dim=-1)


def gaussian_bias(gaussians: Tensor, frame: MapFrame) -> Tensor:
    """[B, N, heads, 4] -> [B, heads, N, h * w], what is added to the scores of every cell; the lowest number where
    there is no content.

    Half the squared distance in standard deviations. Both axes are computed by themselves and added in the end, so
    that nothing larger than the result exists; the padding goes with them.
    """
    low = torch.finfo(gaussians.dtype).min / 4
    x, y, per_x, per_y = gaussians.transpose(1, 2).unsqueeze(-2).unbind(-1)
    found = []
    for centre, per, content, pixels in (
        (x, per_x, frame.columns, frame.pixels[0]),
        (y, per_y, frame.rows, frame.pixels[1]),
    ):
        cells = (torch.arange(content.shape[1], device=content.device) + 0.5) * pixels
        along = ((cells - centre) * per).square() * -0.5
        found.append(along.masked_fill(~content[:, None, None], low))
    along_x, along_y = found
    return (along_y.unsqueeze(-1) + along_x.unsqueeze(-2)).flatten(-2)
