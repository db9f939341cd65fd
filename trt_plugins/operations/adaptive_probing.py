"""AdaptiveProbing: from one level's anchors to the patches of the next finer map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asag.trt_plugins.operations.description import (
    STATIC_SHARED_LIMIT,
    Array,
    Attributes,
    Dimension,
    Layout,
    Operation,
    Shape,
    Tensor,
    fixed,
    sample_anchors,
    sample_maps,
    threads_for,
)

PATCH_SIDE = 15
"""Cells along the side of a probed patch."""


def _output_shapes(shapes: Sequence[Shape], attributes: Attributes) -> list[list[Dimension]]:
    anchors, _, feature, _ = shapes
    batch, places = anchors[0], attributes["capacity"]
    return [
        [batch, places, PATCH_SIDE**2, feature[1]],
        [batch, places, 2],
        [batch, places],
        [batch, anchors[1]],
        [batch],
    ]


def _layout(shapes: Sequence[Shape], attributes: Attributes, element: str, tensor_cores: bool) -> Layout:
    anchors, _, feature, _ = shapes
    count = fixed(anchors[1], "the number of anchors")
    slices = min(8, attributes["capacity"])
    constants = {
        "ANCHORS": count,
        "CHANNELS": fixed(feature[1], "the number of channels"),
        "STRIDE": attributes["stride"],
        "CAPACITY": attributes["capacity"],
        "SLICES": slices,
    }
    threads = min(512, threads_for(count, 2))
    if 8 * count + 4 * threads + 8 * (attributes["capacity"] + threads // 32) + 12 > STATIC_SHARED_LIMIT:
        raise ValueError(
            f"AdaptiveProbing of {count} anchors does not fit the shared memory of a block; use the op's ONNX body or "
            "fewer patches"
        )
    return Layout(constants, (slices, anchors[0], 1), threads, (feature[2], feature[3]))


def _sample(random: np.random.Generator, shapes: Sequence[Sequence[int]], attributes: Attributes) -> list[Array]:
    height, width = (attributes["stride"] * side for side in shapes[2][2:])
    return [
        sample_anchors(random, shapes[0], height, width),
        np.ones(tuple(shapes[1]), np.bool_),
        *sample_maps(random, shapes[2:3]),
        np.full(tuple(shapes[3]), (height, width), np.float32),
    ]


ADAPTIVE_PROBING = Operation(
    name="AdaptiveProbing",
    snake_name="adaptive_probing",
    inputs=(
        Tensor("anchors", "float32"),
        Tensor("valid", "bool"),
        Tensor("feature", "element"),
        Tensor("sizes", "float32"),
    ),
    outputs=(
        Tensor("patches", "element"),
        Tensor("corners", "int64"),
        Tensor("taken", "bool"),
        Tensor("candidate", "bool"),
        Tensor("overflow", "int32"),
    ),
    attributes=(("stride", int), ("capacity", int)),
    output_shapes=_output_shapes,
    layout=_layout,
    sample=_sample,
)
