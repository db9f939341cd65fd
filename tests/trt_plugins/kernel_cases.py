"""Inputs for the ops that the kernels and the ONNX bodies are both tried on, and conversions of 16-bit floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
DEMO = (4, 16, 16, 32)
PUBLISHED = (4, 64, 32, 128)
"""Sizes of SamplingMixing: groups, channels of a group, points, mixed points."""

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""Of the largest value; bfloat16 keeps 8 bits of every intermediate result that passes through shared memory."""

TORCH_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def to_element(array: Array, element: str) -> Array:
    """float32 to the element type; bfloat16 as its bits."""
    if element == "bfloat16":
        return torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return array.astype(element)


def to_float(array: Array, element: str) -> Array:
    """The inverse of :func:`to_element`."""
    if element == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float().numpy()
    return array.astype(np.float32)


def tensors(*arrays: Array) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def pyramid(random: np.random.Generator, batch: int, channels: int, finest: tuple[int, int]) -> list[Array]:
    """P2..P5 with a finest map of `finest` cells, each level half as large, at least one cell."""
    sizes = [(max(finest[0] >> level, 1), max(finest[1] >> level, 1)) for level in range(4)]
    return [random.normal(size=(batch, channels, *size)).astype(np.float32) for size in sizes]


def anchors(random: np.random.Generator, batch: int, count: int, extent: float, coarse: bool = False) -> Array:
    """[B, A, 5]; `coarse` makes many equal confidences and places."""
    centres = random.uniform(-0.1 * extent, 1.1 * extent, (batch, count, 2))
    sizes = random.uniform(2, 200, (batch, count, 2))
    confidence = random.uniform(0, 1, (batch, count, 1))
    if coarse:
        centres, confidence = np.round(centres / 40) * 40, np.round(confidence * 5) / 5
    return np.concatenate((centres, sizes, confidence), axis=-1).astype(np.float32)


def probing_inputs(
    seed: int = 0, batch: int = 2, count: int = 100, cells: tuple[int, int] = (26, 25), coarse: bool = False
) -> list[Array]:
    """anchors, valid, feature and sizes of AdaptiveProbing at stride 16."""
    random = np.random.default_rng(seed)
    extent = 16 * max(cells)
    sizes = np.stack([16 * np.array(cells) * random.uniform(0.4, 1, 2) for _ in range(batch)]).astype(np.float32)
    return [
        anchors(random, batch, count, extent, coarse),
        random.random((batch, count)) < 0.8,
        random.normal(size=(batch, 8, *cells)).astype(np.float32),
        sizes,
    ]


def roi_boxes(random: np.random.Generator, batch: int, queries: int, extent: float) -> Array:
    """[B, Q, 4] `cxcywh`: of all sizes, some far outside, some empty, some exactly between two levels."""
    boxes = np.concatenate(
        (
            random.uniform(-0.3, 1.3, (batch, queries, 2)) * extent,
            extent * 2 ** random.uniform(-8, 2, (batch, queries, 2)),
        ),
        axis=-1,
    )
    special = [
        (20, 20, 112, 112),
        (30, 10, 224, 224),
        (0, 0, 448, 448),
        (5, 5, 0, 0),
        (-900, 40, 50, 50),
        (8, 8, 1e-3, 600),
    ]
    boxes[:, : len(special)] = special
    return boxes.astype(np.float32)


LEVELS = {"level_shapes": (9, 13, 5, 7, 1, 4, 1, 1), "level_points": (4, 2, 1, 3)}
"""Attributes of MultiScaleDeformableAttention: levels down to one cell, with different numbers of points."""


def attention_inputs(
    seed: int = 0,
    batch: int = 2,
    queries: int = 7,
    heads: int = 3,
    channels: int = 16,
    level_shapes: tuple[int, ...] = LEVELS["level_shapes"],
    level_points: tuple[int, ...] = LEVELS["level_points"],
) -> list[Array]:
    """value, locations and weights of MultiScaleDeformableAttention; places inside, on the border and outside."""
    random = np.random.default_rng(seed)
    cells = sum(height * width for height, width in zip(level_shapes[::2], level_shapes[1::2], strict=True))
    shape = (batch, queries, heads, sum(level_points))
    locations = random.uniform(-0.3, 1.3, (*shape, 2))
    odd = [0, 1, -1, 2, 0.5, 1e7, -1e30, 3e38, np.inf, -np.inf, np.nan]
    locations = np.where(random.random(locations.shape) < 0.2, random.choice(odd, locations.shape), locations)
    weights = random.random(shape)
    arrays = random.normal(size=(batch, cells, heads, channels)), locations, weights / weights.sum(-1, keepdims=True)
    return [array.astype(np.float32) for array in arrays]


def grid_inputs(
    seed: int = 0,
    value: tuple[int, int, int, int] = (2, 19, 9, 13),
    places: tuple[int, int] = (7, 5),
) -> list[Array]:
    """value and grid of SampleGrid; places inside, on the border and outside."""
    random = np.random.default_rng(seed)
    grid = random.uniform(-1.2, 1.2, (value[0], *places, 2))
    odd = [0, 1, -1, 2, 0.5, 1e7, -1e30, 3e38, np.inf, -np.inf, np.nan]
    grid = np.where(random.random(grid.shape) < 0.2, random.choice(odd, grid.shape), grid)
    return [random.normal(size=value).astype(np.float32), grid.astype(np.float32)]


SAMPLINGS = [{"padding": padding, "align_corners": aligned} for padding in (0, 1) for aligned in (0, 1)]
"""All attributes of SampleGrid."""


def scores_with_ties(seed: int, batch: int, tokens: int) -> Array:
    """[B, T]: few different scores, of both signs and sizes, and what is no number."""
    random = np.random.default_rng(seed)
    odd = [0.0, -0.0, 1e-40, -1e-40, 1.2e-38, -1.2e-38, 3e38, -3e38, np.inf, -np.inf, np.nan]
    coarse = np.round(random.normal(size=(batch, tokens)) * 2) / 2
    return np.where(random.random(coarse.shape) < 0.3, random.choice(odd, coarse.shape), coarse).astype(np.float32)


RELU_IN_PIXELS = {"activation": 1, "point_unit": 1}
"""Attributes of SamplingMixing that differ from the defaults."""


def mixing_inputs(
    seed: int, batch: int, queries: int, sizes: tuple[int, int, int, int], finest: tuple[int, int], point_unit: int = 4
) -> list[Array]:
    """P2..P5, points and parameters of SamplingMixing; sizes: groups, channels of a group, points, mixed points."""
    random = np.random.default_rng(seed)
    groups, channels, points, mixed = sizes
    place = random.uniform(-0.2, 1.2, (batch, queries, groups, points, 2)) * np.array(finest[::-1])
    level = random.uniform(-1, 4, (batch, queries, groups, points, 1))
    # Far away, exactly on the first cell's centre, and on the map's corner.
    place[:, :, :, :3] = np.array([(1e7, -1e7), (0.5, 0.5), finest[::-1]])
    place, level = place * (4 / point_unit), level + np.log2(4 / point_unit)
    parameters = random.normal(size=(batch, queries, groups * (channels * channels + mixed * points)))
    return [
        *pyramid(random, batch, groups * channels, finest),
        np.concatenate((place, level), axis=-1).astype(np.float32),
        parameters.astype(np.float32),
    ]
