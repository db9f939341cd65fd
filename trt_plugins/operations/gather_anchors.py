"""GatherAnchors: from all levels' anchors to the queries."""

from __future__ import annotations

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
    fixed,
    sample_anchors,
    threads_for,
)


def _output_shapes(shapes: Sequence[Shape], attributes: Attributes) -> list[list[Dimension]]:
    batch = shapes[0][0]
    return [[batch, attributes["most"], 4], [batch, attributes["most"]]]


def _layout(shapes: Sequence[Shape], attributes: Attributes, element: str, tensor_cores: bool) -> Layout:
    anchors = shapes[0]
    count = fixed(anchors[1], "the number of anchors")
    constants = {
        "ANCHORS": count,
        "FIRST": attributes["first"],
        "KEEP_THRESHOLD": f"{float(np.float32(attributes['keep_threshold'])).hex()}f",
        "FEWEST": attributes["fewest"],
        "MOST": attributes["most"],
    }
    return Layout(constants, (anchors[0], 1, 1), threads_for(count, 1))


def _sample(random: np.random.Generator, shapes: Sequence[Sequence[int]], attributes: Attributes) -> list[Array]:
    return [sample_anchors(random, shapes[0], 800, 1344), np.ones(tuple(shapes[1]), np.bool_)]


GATHER_ANCHORS = Operation(
    name="GatherAnchors",
    snake_name="gather_anchors",
    inputs=(Tensor("anchors", "float32"), Tensor("selectable", "bool")),
    outputs=(Tensor("boxes", "float32"), Tensor("valid", "bool")),
    attributes=(("first", int), ("keep_threshold", float), ("fewest", int), ("most", int)),
    output_shapes=_output_shapes,
    layout=_layout,
    sample=_sample,
)
