"""SelectTokens: the tokens of largest score, in a fixed number of places."""

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
    threads_for,
)


def _output_shapes(shapes: Sequence[Shape], attributes: Attributes) -> list[list[Dimension]]:
    places = [shapes[0][0], attributes["capacity"]]
    return [places, list(places)]


def _layout(shapes: Sequence[Shape], attributes: Attributes, element: str, tensor_cores: bool) -> Layout:
    scores = shapes[0]
    tokens, capacity = fixed(scores[1], "the number of tokens"), attributes["capacity"]
    if not 0 < capacity <= tokens:
        raise ValueError(f"{tokens} tokens cannot fill {capacity} places")
    return Layout({"TOKENS": tokens, "CAPACITY": capacity}, (scores[0], 1, 1), threads_for(tokens, 8))


def _sample(random: np.random.Generator, shapes: Sequence[Sequence[int]], attributes: Attributes) -> list[Array]:
    """Scores as a linear layer gives them; images that are not full want fewer tokens than there are places."""
    scores, counts = (tuple(shape) for shape in shapes)
    wanted = random.integers(attributes["capacity"] // 2, attributes["capacity"], counts, endpoint=True)
    return [random.standard_normal(scores, np.float32), wanted]


SELECT_TOKENS = Operation(
    name="SelectTokens",
    snake_name="select_tokens",
    inputs=(Tensor("scores", "float32"), Tensor("counts", "int64")),
    outputs=(Tensor("indices", "int64"), Tensor("active", "bool")),
    attributes=(("capacity", int),),
    output_shapes=_output_shapes,
    layout=_layout,
    sample=_sample,
)
