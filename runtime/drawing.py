"""Drawing detections on images."""

from __future__ import annotations

import colorsys
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from runtime.metadata import ModelMetadata
from runtime.postprocessing import Detections

Colour = tuple[int, int, int]


def class_colour(index: int) -> Colour:
    """A colour for the class of that index; neighbouring classes get hues far apart (golden-ratio steps)."""
    hue = index * 0.618033988749895 % 1.0
    lightness = (0.5, 0.62, 0.38)[index // 7 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_detections(
    image: Image.Image, detections: Detections, metadata: ModelMetadata, score_threshold: float = 0.3
) -> Image.Image:
    """A copy of the image with boxes, class names and scores of detections scoring at least ``score_threshold``.

    The image may be smaller or larger than the original that the detections refer to; boxes are scaled to it and
    clipped to its edges. The most confident detections are drawn on top.
    """
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    height, width = detections.image_size
    scale_x, scale_y = canvas.width / width, canvas.height / height
    line_width = max(2, round(min(canvas.size) / 200))
    font = caption_font(max(11, round(min(canvas.size) / 30)))
    shown = detections.above(score_threshold)
    for box, score, label in reversed(list(zip(shown.boxes, shown.scores, shown.labels, strict=True))):
        left, right = (min(max(float(value) * scale_x, 0), canvas.width - 1) for value in box[[0, 2]])
        top, bottom = (min(max(float(value) * scale_y, 0), canvas.height - 1) for value in box[[1, 3]])
        if right < left or bottom < top:
            continue
        known = int(label) in metadata.category_ids
        colour = class_colour(metadata.category_ids.index(int(label)) if known else int(label))
        draw.rectangle((left, top, right, bottom), outline=colour, width=line_width)
        text = f"{metadata.category_name(int(label))} {score:.2f}"
        _draw_label(draw, (left, top), text, colour=colour, font=font, canvas_size=canvas.size)
    return canvas


def _draw_label(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    *,
    colour: Colour,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    canvas_size: tuple[int, int],
) -> None:
    """Text on a filled background above the box's top-left corner, moved inside the image where it would leave it."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    padding = 2
    width, height = right - left + 2 * padding, bottom - top + 2 * padding
    x = max(0, min(corner[0], canvas_size[0] - width))
    y = corner[1] - height if corner[1] >= height else min(corner[1], canvas_size[1] - height)
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    red, green, blue = colour
    # Rec. 601 luma decides between dark and light text.
    text_colour = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
    draw.text((x + padding - left, y + padding - top), text, fill=text_colour, font=font)


@lru_cache
def caption_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font at a size in pixels."""
    return ImageFont.load_default(size)
