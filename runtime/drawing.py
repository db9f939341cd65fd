"""Drawing detections and annotated objects on images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from asag.runtime.captions import Font, caption
from asag.runtime.coco_dataset import CocoFolder, clipped_boxes
from asag.runtime.coco_file import Id
from asag.runtime.metadata import ModelMetadata
from asag.runtime.postprocessing import Detections

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

_GREY, _RED = (128, 128, 128), (226, 0, 26)

PADDING = 2
"""Pixels around the text of a label."""


def class_colour(index: int) -> Colour:
    """A colour for the class of that index; neighbouring classes get hues far apart (golden-ratio steps)."""
    hue = index * 0.618033988749895 % 1.0
    lightness = (0.5, 0.62, 0.38)[index // 7 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


@dataclass(frozen=True)
class Mark:
    """A box ``xyxy`` [4] in pixels of the original image, with what is written at it; ringed in red, or dashed."""

    box: NDArray[np.floating]
    text: str
    colour: Colour
    ringed: bool = False
    dashed: bool = False


def draw_detections(
    image: Image.Image, detections: Detections, metadata: ModelMetadata, score_threshold: float = 0.3
) -> Image.Image:
    """A copy of the image with boxes, class names and scores of detections scoring at least ``score_threshold``.

    The image may be smaller or larger than the original that the detections refer to; boxes are scaled to it and
    clipped to its edges. The most confident detections are drawn on top, and choose first where their captions stand.
    """
    return draw_marks(image, detection_marks(detections.above(score_threshold), metadata), detections.image_size)


def detection_marks(detections: Detections, metadata: ModelMetadata) -> list[Mark]:
    """Boxes with the classes' names and colours, and scores."""
    places = {number: place for place, number in enumerate(metadata.category_ids)}
    return [
        Mark(box, f"{metadata.category_name(int(label))} {score:.2f}", class_colour(places.get(int(label), int(label))))
        for box, score, label in zip(detections.boxes, detections.scores, detections.labels, strict=True)
    ]


def annotation_marks(folder: CocoFolder, image_id: Id) -> list[Mark]:
    """An image's annotated boxes and their classes; what is to ignore is grey."""
    image, held = folder.images[image_id], folder.objects(image_id)
    found = folder.annotations
    return [
        Mark(box, "ignored" if crowd else folder.category_names[label], _GREY if crowd else class_colour(int(label)))
        for box, label, crowd in zip(
            clipped_boxes(found.boxes[held], image.height, image.width),
            found.labels[held],
            found.crowd[held],
            strict=True,
        )
    ]


def draw_marks(image: Image.Image, marks: Sequence[Mark], image_size: tuple[int, int]) -> Image.Image:
    """A copy of the image with the marks, the first on top; ``image_size`` is the original (height, width)."""
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    height, width = image_size
    scale = np.array([canvas.width / width, canvas.height / height] * 2)
    last = np.array([canvas.width - 1, canvas.height - 1] * 2)
    line_width = max(2, round(min(canvas.size) / 200))
    placed: list[tuple[Rectangle, Mark, _Label]] = []
    for mark in marks:
        left, top, right, bottom = (float(value) for value in np.clip(mark.box * scale, 0, last))
        if right < left or bottom < top:
            continue
        text, font = caption(mark.text, max(11, round(min(canvas.size) / 30)))
        corners = (left, top, right, bottom)
        label = _Label.place(draw, text, font, corners, canvas.size, [label.area for _, _, label in placed])
        placed.append((corners, mark, label))
    for corners, mark, _ in reversed(placed):
        if mark.ringed:
            around = (*(end - line_width for end in corners[:2]), *(end + line_width for end in corners[2:]))
            draw.rectangle(around, outline=_RED, width=2 * line_width)
        if mark.dashed:
            _dashed(draw, corners, mark.colour, line_width)
        else:
            draw.rectangle(corners, outline=mark.colour, width=line_width)
    for _, mark, label in reversed(placed):
        label.draw(draw, mark.colour)
    return canvas


def _dashed(draw: ImageDraw.ImageDraw, corners: Rectangle, colour: Colour, width: int) -> None:
    left, top, right, bottom = corners
    step = 4 * width
    for x in np.arange(left, right, 2 * step):
        for y in (top, bottom):
            draw.line((x, y, min(x + step, right), y), colour, width)
    for y in np.arange(top, bottom, 2 * step):
        for x in (left, right):
            draw.line((x, y, x, min(y + step, bottom)), colour, width)


@dataclass(frozen=True)
class _Label:
    """Text on a filled background."""

    text: str
    font: Font
    area: Rectangle
    origin: tuple[float, float]
    """Where the text begins."""

    @classmethod
    def place(
        cls,
        draw: ImageDraw.ImageDraw,
        text: str,
        font: Font,
        box: Rectangle,
        canvas_size: tuple[int, int],
        taken: Sequence[Rectangle],
    ) -> _Label:
        """A label above its box, below it or inside, where it covers none of `taken`; above where all places do."""
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + 2 * PADDING, bottom - top + 2 * PADDING
        areas = []
        for x in (box[0], box[2] - width):
            for y in (box[1] - height, box[1], box[3], box[3] - height):
                held_x = max(0.0, min(x, canvas_size[0] - width))
                held_y = max(0.0, min(y, canvas_size[1] - height))
                areas.append((held_x, held_y, held_x + width, held_y + height))
        free = (area for area in areas if not any(_overlap(area, other) for other in taken))
        area = next(free, areas[0])
        return cls(text, font, area, (area[0] + PADDING - left, area[1] + PADDING - top))

    def draw(self, draw: ImageDraw.ImageDraw, colour: Colour) -> None:
        """Draw it in the colour of its class."""
        draw.rectangle(self.area, fill=colour)
        red, green, blue = colour
        # Rec. 601 luma decides between dark and light text.
        text_colour = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
        draw.text(self.origin, self.text, fill=text_colour, font=self.font)


def _overlap(first: Rectangle, second: Rectangle) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
