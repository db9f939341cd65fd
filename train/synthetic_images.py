"""Pictures of coloured shapes on textured backgrounds, with the box of every shape.

The class of an object is told by its shape alone: hue, size, stretch and rotation are random. Everything is
drawn from one :class:`numpy.random.Generator`, so a generator in the same state paints the same picture.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

FloatArray = np.ndarray

# Not contiguous and not starting at the number of a list index, so that a mapping error shows in the results.
CATEGORIES: dict[int, str] = {1: "circle", 2: "square", 3: "triangle", 5: "star", 7: "cross", 11: "ring"}

SMALLEST_OBJECT = 12.0
# Share of the objects, and the least and the most pixels of their longer side.
_SIZE_CLASSES = ((0.50, 12.0, 40.0), (0.33, 40.0, 96.0), (0.17, 96.0, 190.0))
_LARGEST_SHARE_OF_IMAGE = 0.62
_LARGEST_OVERLAP = 0.06
_LARGEST_ROTATION = np.deg2rad(20.0)
_LEAST_CONTRAST = 95.0


@dataclass(frozen=True)
class PaintedObject:
    """One object of a picture: category id, box ``(x, y, width, height)`` and area, in pixels of the picture."""

    category_id: int
    box: tuple[float, float, float, float]
    area: float


def _regular_points(count: int, radius: float = 1.0, start: float = -np.pi / 2) -> FloatArray:
    angles = start + np.arange(count) * (2 * np.pi / count)
    return radius * np.stack((np.cos(angles), np.sin(angles)), axis=1)


def _star() -> FloatArray:
    points = np.empty((10, 2))
    points[0::2] = _regular_points(5)
    points[1::2] = _regular_points(5, radius=0.40, start=-np.pi / 2 + np.pi / 5)
    return points


def _cross() -> FloatArray:
    arm = 0.34  # half its width
    corners = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    return np.array(corners + [(-x, -y) for x, y in corners], dtype=float)


def _square() -> FloatArray:
    return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float)


_OUTLINES: dict[str, Callable[[], FloatArray]] = {
    "circle": lambda: _regular_points(72),
    "square": _square,
    "triangle": lambda: _regular_points(3),
    "star": _star,
    "cross": _cross,
    "ring": lambda: _regular_points(72),
}
_RING_HOLE = 0.56


def _shape_mask(
    name: str, size: float, offset: tuple[float, float], generator: np.random.Generator
) -> tuple[FloatArray, tuple[float, float, float, float], float]:
    """Coverage of one shape whose longer side is ``size`` pixels and whose box starts at ``offset`` (under 1 pixel).

    Returns the coverage [h, w] in 0..1, the tight box ``(x, y, width, height)`` in the mask's pixels, exact to the
    supersampling grid, and the covered area in pixels.
    """
    rotation = generator.uniform(-_LARGEST_ROTATION, _LARGEST_ROTATION)
    stretch = np.exp(generator.uniform(-0.3, 0.3))
    turn = np.array([[np.cos(rotation), -np.sin(rotation)], [np.sin(rotation), np.cos(rotation)]])
    transform = turn @ np.diag([stretch, 1.0])
    outline = _OUTLINES[name]() @ transform.T
    low, high = outline.min(axis=0), outline.max(axis=0)
    scale = size / float((high - low).max())
    factor = 8 if size < 64 else 4
    side = int(np.ceil(size)) + 2
    canvas = Image.new("L", (side * factor, side * factor), 0)
    draw = ImageDraw.Draw(canvas)
    shift = np.asarray(offset) - low * scale

    def to_canvas(points: FloatArray) -> list[tuple[float, float]]:
        # PIL's polygon covers the pixels of its corners too: half a canvas pixel less keeps the size right.
        return [(float(x), float(y)) for x, y in (points * scale + shift) * factor - 0.5]

    draw.polygon(to_canvas(outline), fill=255)
    if name == "ring":
        draw.polygon(to_canvas(outline * _RING_HOLE), fill=0)
    filled = np.asarray(canvas) > 0
    rows, columns = np.flatnonzero(filled.any(axis=1)), np.flatnonzero(filled.any(axis=0))
    x, y = columns[0] / factor, rows[0] / factor
    box = (x, y, (columns[-1] + 1) / factor - x, (rows[-1] + 1) / factor - y)
    coverage = filled.reshape(side, factor, side, factor).mean(axis=(1, 3), dtype=np.float32)
    return coverage, box, float(coverage.sum())


def _smooth_noise(height: int, width: int, cells: int, generator: np.random.Generator) -> FloatArray:
    coarse = Image.fromarray(generator.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _background(height: int, width: int, generator: np.random.Generator) -> FloatArray:
    """Texture [height, width, 3] float32 in 0..255: two colours blended by a field, with fine grain."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = generator.uniform(0, 2 * np.pi)
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    kind = generator.choice(["gradient", "noise", "stripes", "checks"])
    if kind == "gradient":
        field = (along - along.min()) / (np.ptp(along) + 1e-6)
    elif kind == "noise":
        field = _smooth_noise(height, width, int(generator.integers(4, 24)), generator)
    else:
        period = generator.uniform(14, 60)
        field = 0.5 + 0.5 * np.sin(along * np.float32(2 * np.pi / period))
        if kind == "checks":
            across = np.float32(-np.sin(angle)) * x + np.float32(np.cos(angle)) * y
            field = np.where((field > 0.5) ^ (np.sin(across * np.float32(2 * np.pi / period)) > 0), 0.75, 0.25)
    field = 0.7 * field + 0.3 * _smooth_noise(height, width, int(generator.integers(3, 9)), generator)
    field = np.clip(field, 0, 1)[..., None].astype(np.float32)
    level = generator.uniform(0.15, 0.85)
    colours = [
        _rgb(generator.random(), generator.uniform(0, 0.45), np.clip(level + generator.uniform(-0.16, 0.16), 0, 1))
        for _ in range(2)
    ]
    grain = generator.normal(0, generator.uniform(1, 6), (height, width, 1)).astype(np.float32)
    return colours[0] * (1 - field) + colours[1] * field + grain


def _rgb(hue: float, saturation: float, value: float) -> FloatArray:
    return np.array(colorsys.hsv_to_rgb(hue, saturation, float(value)), dtype=np.float32) * 255


def _contrasting_colour(surroundings: FloatArray, generator: np.random.Generator) -> FloatArray:
    """A random colour [3] that differs clearly from the mean colour of ``surroundings`` [h, w, 3]."""
    mean = surroundings.mean(axis=(0, 1))
    best, best_distance = mean, -1.0
    for _ in range(24):
        colour = _rgb(generator.random(), generator.uniform(0.45, 1.0), generator.uniform(0.25, 1.0))
        distance = float(np.linalg.norm(colour - mean))
        if distance > best_distance:
            best, best_distance = colour, distance
        if distance >= _LEAST_CONTRAST:
            break
    return best


def _object_sizes(count: int, largest: float, generator: np.random.Generator) -> list[float]:
    shares = [share for share, _, _ in _SIZE_CLASSES]
    sizes = []
    for index in generator.choice(len(_SIZE_CLASSES), size=count, p=shares):
        _, least, most = _SIZE_CLASSES[index]
        size = float(np.exp(generator.uniform(np.log(least), np.log(most))))
        sizes.append(float(np.clip(size, SMALLEST_OBJECT, max(largest, SMALLEST_OBJECT))))
    # The largest first: the small ones then find their place between them.
    return sorted(sizes, reverse=True)


def _overlap_of_smaller(box: tuple[float, ...], others: list[tuple[float, float, float, float]]) -> float:
    """Largest intersection of ``box`` with one of ``others``, as a share of the smaller of the two."""
    if not others:
        return 0.0
    other = np.asarray(others)
    width = np.minimum(box[0] + box[2], other[:, 0] + other[:, 2]) - np.maximum(box[0], other[:, 0])
    height = np.minimum(box[1] + box[3], other[:, 1] + other[:, 3]) - np.maximum(box[1], other[:, 1])
    smaller = np.minimum(box[2] * box[3], other[:, 2] * other[:, 3])
    return float((width.clip(0) * height.clip(0) / smaller).max())


def _free_place(
    box: tuple[float, float, float, float],
    room: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
    generator: np.random.Generator,
) -> tuple[int, int] | None:
    """Top and left in pixels, at most ``room``, where ``box`` hardly overlaps a taken one; None when none is found."""
    if min(room) < 0:
        return None
    for _ in range(30):
        top, left = int(generator.integers(room[0] + 1)), int(generator.integers(room[1] + 1))
        if _overlap_of_smaller((left + box[0], top + box[1], box[2], box[3]), taken) <= _LARGEST_OVERLAP:
            return top, left
    return None


def _paint_object(
    canvas: FloatArray, painted: list[PaintedObject], size: float, generator: np.random.Generator
) -> PaintedObject | None:
    """Paint one object of a random class into ``canvas`` [h, w, 3] in place; None when it finds no place."""
    category_id = list(CATEGORIES)[int(generator.integers(len(CATEGORIES)))]
    offset = (float(generator.random()), float(generator.random()))
    coverage, box, area = _shape_mask(CATEGORIES[category_id], size, offset, generator)
    rows, columns = coverage.shape
    room = (canvas.shape[0] - rows, canvas.shape[1] - columns)
    place = _free_place(box, room, [other.box for other in painted], generator)
    if place is None:
        return None
    top, left = place
    region = canvas[top : top + rows, left : left + columns]
    colour = _contrasting_colour(region, generator)
    shading = np.linspace(-1, 1, rows, dtype=np.float32)[:, None, None] * generator.uniform(-22, 22)
    alpha = coverage[..., None]
    region[:] = region * (1 - alpha) + (colour + shading) * alpha
    return PaintedObject(category_id, (left + box[0], top + box[1], box[2], box[3]), area)


def paint_image(
    height: int, width: int, objects: tuple[int, int], generator: np.random.Generator
) -> tuple[Image.Image, list[PaintedObject]]:
    """One picture with ``objects`` = (fewest, most) shapes, hardly overlapping and wholly inside.

    An object that finds no place is made smaller; a picture that is too small for the fewest gets what fits.
    Returns the RGB picture and its objects in the order of painting.
    """
    canvas = _background(height, width, generator)
    painted: list[PaintedObject] = []
    count = int(generator.integers(objects[0], objects[1] + 1))
    for size in _object_sizes(count, _LARGEST_SHARE_OF_IMAGE * min(height, width), generator):
        smaller = size
        while smaller >= SMALLEST_OBJECT:
            placed = _paint_object(canvas, painted, smaller, generator)
            if placed is not None:
                painted.append(placed)
                break
            smaller *= 0.6
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), painted
