"""A picture with a query's Gaussians over it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_DARKER = 0.45
"""How much of the picture is left where nothing is looked at."""
_STRONGEST = 0.75
"""How much of the picture the warmest colour hides."""


def heat_of(gaussians: NDArray[np.float64], width: int, height: int) -> NDArray[np.float64]:
    """The sum of Gaussians at every pixel's centre, [height, width] in 0..1 of its largest value.

    gaussians: [H, 4], the centre (x, y) in pixels, and how many standard deviations a pixel is along x and y. Those
    that are not finite are left out.
    """
    gaussians = gaussians[np.isfinite(gaussians).all(axis=1)]
    x, y, per_x, per_y = gaussians.T
    columns, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
    along_x = np.exp(-0.5 * ((columns[:, None] - x) * per_x) ** 2)
    along_y = np.exp(-0.5 * ((rows[:, None] - y) * per_y) ** 2)
    heat = along_y @ along_x.T
    return heat / max(float(heat.max(initial=0.0)), 1e-12)


def draw_heat_map(picture: Image.Image, gaussians: NDArray[np.float64]) -> Image.Image:
    """A copy of a picture, dark where nothing is looked at, and from red to white where most is.

    gaussians: see :func:`heat_of`, in the picture's pixels.
    """
    heat = heat_of(gaussians, picture.width, picture.height)[..., None]
    colours = np.clip(3 * heat - np.arange(3), 0, 1) * 255
    pixels = np.asarray(picture.convert("RGB"), np.float64) * _DARKER
    share = _STRONGEST * np.sqrt(heat)
    return Image.fromarray((pixels * (1 - share) + colours * share).astype(np.uint8))
