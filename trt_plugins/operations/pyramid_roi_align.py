"""PyramidRoIAlign: 7x7 features of each box from the pyramid level that fits it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from asag.trt_plugins.operations.description import (
    PYRAMID,
    STRIDES,
    Array,
    Attributes,
    Dimension,
    Layout,
    Operation,
    Shape,
    Tensor,
    Work,
    fixed,
    map_sizes,
    sample_maps,
)

ROI_SIDE = 7
"""Bins along the side of a box."""

_TAPS = ROI_SIDE**2 * 4 * 4
"""Values that a channel of a box is made of: four samples for each bin, four neighbours for each sample."""


def _output_shapes(shapes: Sequence[Shape], attributes: Attributes) -> list[list[Dimension]]:
    boxes = shapes[4]
    return [[boxes[0], boxes[1], shapes[0][1], ROI_SIDE, ROI_SIDE]]


def _layout(shapes: Sequence[Shape], attributes: Attributes, element: str, tensor_cores: bool) -> Layout:
    channels, boxes = fixed(shapes[0][1], "the number of channels"), shapes[4]
    maps, stride = attributes["maps"], attributes["first_stride"]
    if not 1 <= maps <= len(PYRAMID) or stride < 1 or stride & (stride - 1):
        raise ValueError(
            f"PyramidRoIAlign has 1 to {len(PYRAMID)} maps and a power of two as stride, not {maps} and {stride}"
        )
    chunk = max(size for size in range(1, 65) if channels % size == 0)
    constants = {"CHANNELS": channels, "CHUNK": chunk, "MAPS": maps, "FIRST_LEVEL": stride.bit_length() - 1}
    return Layout(constants, (channels // chunk, boxes[1], boxes[0]), 256, (boxes[1], *map_sizes(shapes)))


def _work(shapes: Sequence[Sequence[int]], attributes: Attributes) -> Work:
    """Each box reads of the one level that it belongs to."""
    *given, boxes = shapes
    maps = given[: PYRAMID_ROI_ALIGN.complete(attributes)["maps"]]
    taps = math.prod(boxes[:2]) * maps[0][1] * _TAPS
    return Work(2.0 * taps, min(sum(math.prod(shape) for shape in maps), taps))


def _sample(random: np.random.Generator, shapes: Sequence[Sequence[int]], attributes: Attributes) -> list[Array]:
    *maps, boxes = shapes
    stride = PYRAMID_ROI_ALIGN.complete(attributes)["first_stride"]
    height, width = (stride * side for side in maps[0][2:])
    centres = random.random((*boxes[:2], 2)) * (width, height)
    sides = np.exp(random.uniform(np.log(16), np.log(600), (*boxes[:2], 2)))
    return [*sample_maps(random, maps), np.concatenate((centres, sides), axis=-1).astype(np.float32)]


PYRAMID_ROI_ALIGN = Operation(
    name="PyramidRoIAlign",
    snake_name="pyramid_roi_align",
    inputs=(*PYRAMID, Tensor("boxes", "float32")),
    outputs=(Tensor("rois", "element"),),
    attributes=(("maps", int), ("first_stride", int)),
    output_shapes=_output_shapes,
    layout=_layout,
    sample=_sample,
    work=_work,
    half_inputs=(0, 1, 2, 3),
    defaults={"maps": len(PYRAMID), "first_stride": STRIDES[0]},
)
