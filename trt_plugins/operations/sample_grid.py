"""SampleGrid: maps read at places of a grid."""

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
    sample_maps,
)

_TAPS = 4
"""Cells under a sample."""

_THREADS = 128

_TOGETHER = 16
"""Channels of a block: each thread reads as many from the place that it has worked out."""


def _output_shapes(shapes: Sequence[Shape], attributes: Attributes) -> list[list[Dimension]]:
    value, grid = shapes
    return [[value[0], value[1], grid[1], grid[2]]]


def _layout(shapes: Sequence[Shape], attributes: Attributes, element: str, tensor_cores: bool) -> Layout:
    value, grid = shapes
    channels, height, width = (fixed(value[axis], f"axis {axis} of the value") for axis in (1, 2, 3))
    points = fixed(grid[1], "axis 1 of the grid") * fixed(grid[2], "axis 2 of the grid")
    padding, aligned = attributes["padding"], attributes["align_corners"]
    if padding not in (0, 1) or aligned not in (0, 1):
        raise ValueError(f"SampleGrid has no padding {padding} or alignment {aligned}; each is 0 or 1")
    if max(channels * height * width, channels * points) >= 1 << 31:
        raise ValueError(
            f"SampleGrid has no kernel for {channels} channels of {height} x {width} cells and {points} places; use the"
            " op's ONNX body"
        )
    constants: dict[str, str | int] = {
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": width,
        "POINTS": points,
        "BORDER": padding,
        "ALIGNED": aligned,
        "TOGETHER": _TOGETHER,
    }
    return Layout(constants, (-(-points // _THREADS), -(-channels // _TOGETHER), value[0]), _THREADS)


def _work(shapes: Sequence[Sequence[int]], attributes: Attributes) -> Work:
    """Four cells for each place and channel."""
    value, grid = shapes
    taps = math.prod(value[:2]) * math.prod(grid[1:3]) * _TAPS
    return Work(2.0 * taps, min(math.prod(value), taps))


def _sample(random: np.random.Generator, shapes: Sequence[Sequence[int]], attributes: Attributes) -> list[Array]:
    """Places all over the map, some outside."""
    value, grid = shapes
    return [*sample_maps(random, [value]), random.uniform(-1.1, 1.1, tuple(grid)).astype(np.float32)]


SAMPLE_GRID = Operation(
    name="SampleGrid",
    snake_name="sample_grid",
    inputs=(Tensor("value", "element", sampled=True), Tensor("grid", "float32")),
    outputs=(Tensor("samples", "element"),),
    attributes=(("padding", int), ("align_corners", int)),
    output_shapes=_output_shapes,
    layout=_layout,
    sample=_sample,
    work=_work,
    half_inputs=(0,),
)
