"""A grid of small pictures as one file."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from PIL import Image

from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.coco_file import Id
from asag.runtime.drawing import annotation_marks, draw_marks
from asag.runtime.files import atomic_path
from asag.runtime.preprocessing import resize, resized_size

CELL = 320
"""Longest side of a picture in the grid, pixels."""
_GAP = 4


def to_cell(image: Image.Image) -> Image.Image:
    """The image in the size of the grid's cells, its aspect kept."""
    return resize(image, resized_size(image.height, image.width, CELL, CELL))


def write_sheet(path: str | os.PathLike[str], cells: Sequence[Image.Image]) -> None:
    """Write pictures no larger than a cell side by side, as a JPEG or what else the file's suffix says."""
    columns = math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / max(columns, 1))
    grid = Image.new("RGB", (columns * (CELL + _GAP) + _GAP, rows * (CELL + _GAP) + _GAP), "white")
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        grid.paste(cell, (_GAP + column * (CELL + _GAP), _GAP + row * (CELL + _GAP)))
    with atomic_path(path) as temporary:
        try:
            grid.save(temporary, quality=88)
        except ValueError:
            raise ValueError(f"cannot write a picture as {path}: name it .jpg or .png") from None


def annotated_cell(folder: CocoFolder, image_id: Id) -> Image.Image:
    """An image with its annotated boxes and their classes, in the size of a cell; what is to ignore is grey.

    Raises what reading the picture raises.
    """
    image = folder.images[image_id]
    marks = annotation_marks(folder, image_id)
    return draw_marks(to_cell(folder.load(image_id)), marks, (image.height, image.width))
