"""Files that compute in 16 bits, as `.half()` and float16 converters leave them, become files in float32.

Weights keep the values that 16 bits left them; everything is computed in float32, places of samples among it. What
else may be in 16 bits, `asag build --precision fp16` then decides.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import TensorProto, numpy_helper

from asag.export.adoption.graph import all_graphs, attribute_of, replace

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type")
"""Attributes of standard operators that name a type."""


def widen(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """Give every value of 16 bits in a file whose functions are inlined 32, in place; the file as it was before, None
    where nothing changes.

    Casts that then change nothing go. Some converters leave casts to float32 in the midst of float16,
    which no runtime takes; widened, these files are valid.
    """
    if not any(any(_halves(graph)) for graph in all_graphs(proto.graph)):
        return None
    before = onnx.ModelProto()
    before.CopyFrom(proto)
    for graph in all_graphs(proto.graph):
        types, tensors, values = _halves(graph)
        for attribute in types:
            attribute.i = TensorProto.FLOAT
        for tensor in tensors:
            widened = numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(widened, tensor.name))
        for value in values:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
        del graph.value_info[:]  # converters note types there that nodes do not have
    _drop_idle_casts(proto)
    return before


def _halves(
    graph: onnx.GraphProto,
) -> tuple[list[onnx.AttributeProto], list[onnx.TensorProto], list[onnx.ValueInfoProto]]:
    """Attributes of a graph's nodes that name a type of 16 bits, and tensors, inputs and outputs that have one."""
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    sparse = [weight.values for weight in graph.sparse_initializer]
    types = [one for one in attributes if one.name in _TYPE_ATTRIBUTES and one.i in HALVES]
    tensors = [one for one in (*graph.initializer, *sparse, *_tensors(attributes)) if one.data_type in HALVES]
    values = [one for one in (*graph.input, *graph.output) if one.type.tensor_type.elem_type in HALVES]
    return types, tensors, values


def _tensors(attributes: Iterable[onnx.AttributeProto]) -> Iterable[TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def _drop_idle_casts(proto: onnx.ModelProto) -> None:
    """Casts from float32 to float32 stand in the way of whoever follows a value."""
    known = onnx.shape_inference.infer_shapes(proto).graph
    wide = {value.name for value in (*known.value_info, *known.input) if _is_float(value)}
    wide |= {tensor.name for tensor in known.initializer if tensor.data_type == TensorProto.FLOAT}
    given = {value.name for value in proto.graph.output}
    source: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type == "Cast" and node.input[0] in wide and attribute_of(node, "to") == TensorProto.FLOAT:
            source[node.output[0]] = source.get(node.input[0], node.input[0])
    for graph in all_graphs(proto.graph):
        for node in graph.node:
            node.input[:] = [source.get(name, name) for name in node.input]
    kept = [node for node in proto.graph.node if node.output[0] not in source or node.output[0] in given]
    replace(proto.graph.node, kept)


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type == TensorProto.FLOAT
