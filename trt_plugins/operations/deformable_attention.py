"""MultiScaleDeformableAttention: each query's weighted samples of all levels, head by head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from asag.trt_plugins.operations.description import (
    Array,
    Attributes,
    Dimension,
    Layout,
    Operation,
    Shape,
    Tensor,
    Work,
    fixed,
)

_TAPS = 4
"""Cells under a sample."""

_MOST_CELLS = 1 << 22
"""The kernel counts cells in float32."""


def _output_shapes(shapes: Sequence[Shape], attributes: Attributes) -> list[list[Dimension]]:
    value, locations, _ = shapes
    return [[locations[0], locations[1], value[2] * value[3]]]


def _layout(shapes: Sequence[Shape], attributes: Attributes, element: str, tensor_cores: bool) -> Layout:
    value, locations, _ = shapes
    cells, heads, channels = (fixed(value[axis], f"axis {axis} of the value") for axis in (1, 2, 3))
    queries, points = fixed(locations[1], "the number of queries"), fixed(locations[3], "the number of points")
    sides, counts = attributes["level_shapes"], attributes["level_points"]
    found = sum(height * width for height, width in zip(sides[::2], sides[1::2], strict=False))
    if len(sides) != 2 * len(counts) or (found, sum(counts)) != (cells, points) or min(*sides, *counts) < 1:
        raise ValueError(
            f"MultiScaleDeformableAttention has {cells} cells and {points} points, not those of its levels"
        )
    lanes = _lanes(channels)
    if lanes > 32 or cells > _MOST_CELLS or cells * heads * channels >= 1 << 32:
        raise ValueError(
            f"MultiScaleDeformableAttention has no kernel for {cells} cells with {heads} heads of {channels} channels; "
            "use the op's ONNX body"
        )
    constants: dict[str, str | int] = {
        "QUERIES": queries,
        "CELLS": cells,
        "HEADS": heads,
        "CHANNELS": channels,
        "POINTS": points,
        "LANES": lanes,
        "LEVELS": len(counts),
        "LEVEL_SHAPES": ",".join(map(str, sides)),
        "LEVEL_POINTS": ",".join(map(str, counts)),
    }
    # Neighbours in a block find each other's cells in the cache, but few queries must reach all multiprocessors first.
    threads = 256 if queries * heads * lanes > 1 << 16 else 64
    blocks = -(-queries * heads // (threads // lanes))
    return Layout(constants, (blocks, locations[0], 1), threads)


def _lanes(channels: int) -> int:
    """Threads for the channels of one query and head, a power of two; each takes as many channels, at most eight."""
    together = math.gcd(channels, 8)
    return 1 << (channels // together - 1).bit_length()


def _work(shapes: Sequence[Sequence[int]], attributes: Attributes) -> Work:
    """Four cells for each point, each channel of which is multiplied and added."""
    value, locations = shapes[:2]
    taps = math.prod(locations[:4]) * value[3] * _TAPS
    return Work(2.0 * taps, min(math.prod(value), taps))


def _sample(random: np.random.Generator, shapes: Sequence[Sequence[int]], attributes: Attributes) -> list[Array]:
    """Queries in the order of the cells, each with points a few cells around its place on every level."""
    value, weights = tuple(shapes[0]), tuple(shapes[2])
    batch, queries, heads, points = weights
    sides = np.array(attributes["level_shapes"]).reshape(-1, 2)
    levels = np.repeat(np.arange(len(sides)), attributes["level_points"])
    cell = np.linspace(0, value[1] - 1, queries).astype(np.int64)
    own = [np.stack(np.divmod(np.arange(height * width), width)[::-1], -1) + 0.5 for height, width in sides]
    centres = np.concatenate([places / side[::-1] for places, side in zip(own, sides, strict=True)])[cell]
    offsets = random.normal(size=(batch, queries, heads, points, 2)) * 2 / sides[levels][:, ::-1]
    shares = np.exp(random.standard_normal(weights))
    return [
        random.standard_normal(value, np.float32),
        (centres[None, :, None, None] + offsets).astype(np.float32),
        (shares / shares.sum(-1, keepdims=True)).astype(np.float32),
    ]


DEFORMABLE_ATTENTION = Operation(
    name="MultiScaleDeformableAttention",
    snake_name="deformable_attention",
    inputs=(Tensor("value", "element", sampled=True), Tensor("locations", "float32"), Tensor("weights", "element")),
    outputs=(Tensor("attended", "element"),),
    attributes=(("level_shapes", tuple), ("level_points", tuple)),
    output_shapes=_output_shapes,
    layout=_layout,
    sample=_sample,
    work=_work,
    half_inputs=(0, 2),
)
