"""Where a graph may compute deformable attention: values worth comparing, found by walking from its GridSamples.

A walk only proposes. Whether a value is what it is proposed for, :mod:`export.adoption.verification` finds by running.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from asag.export.adoption.graph import GraphIndex, attribute_of

LAYOUT_OPERATORS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Identity", "Flatten")
"""They move numbers and change none; what comes out depends on the first input alone, or on all of a Concat."""

CUTTING_OPERATORS = (*LAYOUT_OPERATORS, "Slice", "Split", "Gather")
"""Going back, parts of a larger value lead to it."""


@dataclass(frozen=True)
class Level:
    """A GridSample of the graph: its node's place, and the names of its values."""

    node: int
    value: str
    grid: str


@dataclass(frozen=True)
class Candidate:
    """What may be one attention: levels whose samples are multiplied with weights and summed.

    ``total`` is the sum; the other fields are names of values that may be, laid out anew, the op's inputs and result.
    """

    levels: tuple[Level, ...]
    weights: str
    total: str
    total_node: int
    values: tuple[str, ...]
    locations: tuple[str, ...]
    weight_layouts: tuple[str, ...]
    results: tuple[str, ...]


def samples_bilinearly(node: onnx.NodeProto) -> bool:
    """Whether a GridSample is of the kind that our ops compute, but for padding and alignment."""
    return attribute_of(node, "mode", "bilinear") in ("bilinear", "linear")


def is_level(node: onnx.NodeProto) -> bool:
    """Whether a GridSample is as in deformable attention: bilinear, zeros around the map, corners not aligned."""
    padding = attribute_of(node, "padding_mode", "zeros")
    return samples_bilinearly(node) and padding == "zeros" and not attribute_of(node, "align_corners", 0)


def find_candidates(index: GraphIndex) -> tuple[Candidate, ...]:
    """Every product of samples with something that is then summed."""
    found = []
    for place, node in enumerate(index.graph.node):
        if node.op_type != "Mul" or node.domain not in ("", "ai.onnx"):
            continue
        for samples, weights in (tuple(node.input), tuple(reversed(node.input))):
            levels = _levels(index, samples, place)
            if levels and not _levels(index, weights, place):
                candidate = _candidate(index, node, weights, levels)
                if candidate is not None:
                    found.append(candidate)
                break
    return tuple(found)


def _levels(index: GraphIndex, value: str, reader: int) -> tuple[Level, ...]:
    """The GridSamples that a value is laid out from, in order; none where it holds anything else, or somebody beside
    `reader` reads it or what it is made of.
    """
    node = index.node(value)
    if node is None or index.only_reader(value) != reader:
        return ()
    place = index.producer[value]
    if node.op_type == "GridSample":
        return (Level(place, node.input[0], node.input[1]),) if is_level(node) else ()
    if node.op_type == "Concat":
        parts = [_levels(index, name, place) for name in node.input]
        return tuple(level for part in parts for level in part) if all(parts) else ()
    return _levels(index, node.input[0], place) if node.op_type in LAYOUT_OPERATORS else ()


def _candidate(index: GraphIndex, product: onnx.NodeProto, weights: str, levels: tuple[Level, ...]) -> Candidate | None:
    place = index.only_reader(product.output[0])
    if place is None:
        return None
    total = index.graph.node[place]
    if total.op_type != "ReduceSum" or attribute_of(total, "keepdims", 1) or total.input[0] != product.output[0]:
        return None
    return Candidate(
        levels=levels,
        weights=weights,
        total=total.output[0],
        total_node=place,
        values=tuple(_sources(index, levels[0].value)),
        locations=tuple(_fractions(index, levels[0].grid)),
        weight_layouts=tuple(_sources(index, weights)),
        results=tuple(_layouts_of(index, total.output[0])),
    )


def _sources(index: GraphIndex, value: str) -> Iterator[str]:
    """A value, and those that it is laid out or cut from, nearest first."""
    while True:
        yield value
        node = index.node(value)
        if node is None or node.op_type not in CUTTING_OPERATORS or (node.op_type == "Concat" and len(node.input) > 1):
            return
        value = node.input[0]


def _fractions(index: GraphIndex, grid: str) -> Iterator[str]:
    """Values that may hold a grid's places, -1..1, as fractions."""
    doubled = _less_one(index, list(_sources(index, grid))[-1])
    if doubled is not None:
        yield from _sources(index, doubled)


def _less_one(index: GraphIndex, value: str) -> str | None:
    """What a value is 2 x - 1 of, going by the operators; running tells whether the constants are those."""
    step = index.node(value)
    if step is None or step.op_type not in ("Sub", "Add"):
        return None
    for name in step.input:
        double = index.node(name)
        if double is not None and double.op_type in ("Mul", "Add"):
            moving = [source for source in double.input if index.constant(source) is None]
            if moving:
                return moving[0]
    return None


def _layouts_of(index: GraphIndex, value: str) -> Iterator[str]:
    """A value and its layouts, as long as nobody else reads them."""
    while True:
        yield value
        place = index.only_reader(value)
        if place is None:
            return
        node = index.graph.node[place]
        if node.op_type not in LAYOUT_OPERATORS or node.op_type == "Concat" or node.input[0] != value:
            return
        value = node.output[0]
