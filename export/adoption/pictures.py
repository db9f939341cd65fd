"""Pictures to verify a file with: a person's photographs, or made-up ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from asag.runtime.image_source import images_in
from asag.runtime.preprocessing import load_image

MADE_UP, PHOTOGRAPHS = 6, 20
"""How many of each at most."""

_ASPECTS = (1.0, 0.7, 1.5, 0.9, 1.9, 0.55)
"""Height by width of the made-up ones, over those of the input."""


def verification_pictures(size: tuple[int, int], folder: Path | None) -> tuple[tuple[str, Image.Image], ...]:
    """Names and pictures; photographs are taken evenly by name from the folder.

    size: (height, width) of the input. Raises what reading a picture raises, and ValueError for a folder without any.
    """
    if folder is None:
        return tuple((f"made-up picture {number}", made_up(number, size)) for number in range(MADE_UP))
    if not folder.is_dir():
        raise FileNotFoundError(f"no images to verify with: {folder} is not a folder")
    paths = images_in(folder)
    count = min(len(paths), PHOTOGRAPHS)
    chosen = [paths[number * len(paths) // count] for number in range(count)]
    return tuple((str(path), load_image(path)) for path in chosen)


def made_up(number: int, size: tuple[int, int]) -> Image.Image:
    """Blobs and edges: random values at several scales, of about the input's size and another aspect."""
    random = np.random.default_rng(number)
    aspect = _ASPECTS[number % len(_ASPECTS)] ** 0.5
    height, width = max(8, round(size[0] * 1.3 * aspect)), max(8, round(size[1] * 1.3 / aspect))
    total = np.zeros((height, width, 3))
    for cells, method in _SCALES:
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        total += np.asarray(coarse.resize((width, height), method), np.float64) / cells**0.5
    low, high = total.min((0, 1)), total.max((0, 1))
    contrast = random.uniform(0.4, 1, 3)
    scaled = (total - low) / (high - low) * contrast + random.uniform(0, 1 - contrast)
    return Image.fromarray((scaled * 255).astype(np.uint8))


_SCALES: Sequence[tuple[int, Image.Resampling]] = (
    (2, Image.Resampling.BILINEAR),
    (5, Image.Resampling.BILINEAR),
    (12, Image.Resampling.NEAREST),
    (30, Image.Resampling.NEAREST),
)
