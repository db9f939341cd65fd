"""Putting our ops into a foreign graph, in the place of its GridSamples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from asag.export.adoption.attention import samples_bilinearly
from asag.export.adoption.graph import NodeWriter, all_graphs, attribute_of, prune, replace
from asag.export.adoption.verification import Attention
from asag.export.operator_set import STANDARD_DOMAINS
from asag.trt_plugins.operations import DOMAIN

PADDINGS = {"zeros": 0, "border": 1}
"""What `SampleGrid` calls a padding mode of GridSample."""


def replace_attentions(proto: onnx.ModelProto, attentions: Sequence[Attention]) -> None:
    """Put a MultiScaleDeformableAttention in the place of each attention, in place; what only that needed, goes."""
    graph = proto.graph
    added: dict[int, list[onnx.NodeProto]] = {}
    renamed: dict[str, str] = {}
    for number, attention in enumerate(attentions):
        writer = NodeWriter(f"attention/{number}/")
        result = attention.result or attention.candidate.total
        renamed[result] = f"{writer.prefix}replaced"
        _write_attention(writer, attention, result)
        added[attention.candidate.total_node] = writer.nodes
        graph.initializer.extend(writer.weights)
    nodes = []
    for place, node in enumerate(graph.node):
        # Who makes the result now, makes it under another name, for nobody.
        node.output[:] = [renamed.get(name, name) for name in node.output]
        nodes += [node, *added.get(place, ())]
    replace(graph.node, nodes)
    prune(graph)


def _write_attention(add: NodeWriter, attention: Attention, result: str) -> None:
    """The op and what lays its inputs out for it, or its result for the file."""
    heads, channels = attention.heads, attention.channels
    points = sum(attention.level_points)
    value = _shaped(add, attention.value or _value(add, attention), -1, _cells(attention), heads, channels)
    locations = attention.locations or _locations(add, attention)
    locations = _shaped(add, locations, -1, attention.queries, heads, points, 2)
    weights = attention.weights or _weights(add, attention)
    weights = _shaped(add, weights, -1, attention.queries, heads, points)
    attended = add(
        "MultiScaleDeformableAttention",
        value,
        locations,
        weights,
        output=result if attention.result else "",
        domain=DOMAIN,
        level_shapes=[side for shape in attention.level_shapes for side in shape],
        level_points=list(attention.level_points),
        plugin_namespace=DOMAIN,
    )
    if attention.result is None:
        rows = add("Transpose", attended, perm=[0, 2, 1])
        add("Reshape", rows, add.integers(-1, channels, attention.queries), output=result)


def _cells(attention: Attention) -> int:
    return sum(height * width for height, width in attention.level_shapes)


def _shaped(add: NodeWriter, value: str, *shape: int) -> str:
    return add("Reshape", value, add.integers(*shape))


def _value(add: NodeWriter, attention: Attention) -> str:
    """The levels' maps [B*M, D, H, W] as cells [B, S, M, D]."""
    rows = [
        _shaped(add, level.value, -1, attention.heads, attention.channels, height * width)
        for level, (height, width) in zip(attention.candidate.levels, attention.level_shapes, strict=True)
    ]
    return add("Transpose", add("Concat", *rows, axis=3), perm=[0, 3, 1, 2])


def _locations(add: NodeWriter, attention: Attention) -> str:
    """The levels' grids [B*M, Q, P, 2], -1..1, as fractions [B, Q, M, N, 2]."""
    grid = add("Concat", *(level.grid for level in attention.candidate.levels), axis=2)
    fractions = add("Div", add("Add", grid, add.constant(1, np.float32)), add.constant(2, np.float32))
    rows = _shaped(add, fractions, -1, attention.heads, attention.queries, sum(attention.level_points), 2)
    return add("Transpose", rows, perm=[0, 2, 1, 3, 4])


def _weights(add: NodeWriter, attention: Attention) -> str:
    """[B*M, 1, Q, N] -> [B, Q, M, N]"""
    rows = _shaped(
        add, attention.candidate.weights, -1, attention.heads, attention.queries, sum(attention.level_points)
    )
    return add("Transpose", rows, perm=[0, 2, 1, 3])


def replace_samples(proto: onnx.ModelProto, unfit: Mapping[str, str]) -> tuple[str, ...]:
    """Put a SampleGrid in the place of each GridSample that it can compute, in place, also inside other nodes.

    unfit: what :func:`unfit_grids` gives. Returns what the others do, such as "mode bicubic".
    """
    left = []
    for graph in all_graphs(proto.graph):
        for node in graph.node:
            if node.op_type != "GridSample" or node.domain not in STANDARD_DOMAINS:
                continue
            padding = attribute_of(node, "padding_mode", "zeros")
            if not samples_bilinearly(node):
                left.append(f"mode {attribute_of(node, 'mode')}")
            elif padding not in PADDINGS:
                left.append(f"padding {padding}")
            elif node.input[1] in unfit:
                left.append(unfit[node.input[1]])
            else:
                aligned = attribute_of(node, "align_corners", 0)
                node.op_type, node.domain = "SampleGrid", DOMAIN
                attributes = {"padding": PADDINGS[padding], "align_corners": aligned, "plugin_namespace": DOMAIN}
                replace(node.attribute, (helper.make_attribute(name, value) for name, value in attributes.items()))
    return tuple(left)


def unfit_grids(proto: onnx.ModelProto) -> dict[str, str]:
    """Values of a foreign file that a SampleGrid does not take as places, as far as inference tells, and why.

    Volumes can be sampled since operator set 20.
    """
    known = onnx.shape_inference.infer_shapes(proto).graph
    types = {value.name: value.type.tensor_type for value in (*known.value_info, *known.input)}
    unfit = {name: "volumes" for name, found in types.items() if len(found.shape.dim) == 5}
    return unfit | {name: "places in float64" for name, found in types.items() if found.elem_type == TensorProto.DOUBLE}
