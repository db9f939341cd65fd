"""The least that each stage of an exported network has to do: arithmetic and bytes, read off the graph.

Operations are twice the multiply-adds of convolutions and matrix products, and of the custom ops by their formulas;
element-wise steps, norms, sorting and suppression count nothing. A stage reads its weights and its inputs and writes
its outputs once; what it keeps to itself in between moves no bytes. Where an op samples the feature maps, it reads at
most one value for each tap.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from asag.runtime.metadata import ModelMetadata
from asag.runtime.stages.graph import network_parts, node_parts, part_ends, values_read

if TYPE_CHECKING:
    from asag.trt_plugins.operations import Operation, Work


@dataclasses.dataclass(frozen=True)
class StageWork:
    """Floating-point operations of one batch, those in 16 bits apart, and bytes that have to move."""

    stage: str
    operations: float
    half_operations: float
    bytes: float


def stage_work(model: Any, metadata: ModelMetadata, batch_size: int = 1) -> tuple[StageWork, ...]:
    """The work of every part of an exported model (``onnx.ModelProto``), in order.

    Raises ValueError for a graph that is no export of this project or does not tell its shapes.
    """
    graph = model.graph
    stages = node_parts(graph.node, part_ends(graph.node, metadata))
    values = GraphValues(model, batch_size)
    found = []
    for stage in network_parts(metadata):
        nodes = [node for node, of_node in zip(graph.node, stages, strict=True) if of_node == stage]
        others = [node for node, of_node in zip(graph.node, stages, strict=True) if of_node != stage]
        operations = [(node_operations(node, values), values.is_half(node.output[0])) for node in nodes]
        found.append(
            StageWork(
                stage=stage,
                operations=sum(count for count, half in operations if not half),
                half_operations=sum(count for count, half in operations if half),
                bytes=_bytes(nodes, others, values),
            )
        )
    return tuple(found)


class GraphValues:
    """Shapes and types of a graph's values, for one batch size."""

    def __init__(self, model: Any, batch_size: int) -> None:
        import onnx

        graph = onnx.shape_inference.infer_shapes(_with_batch(model, batch_size), data_prop=True).graph
        self.outputs = {value.name for value in graph.output}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, int] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            if _is_known(value):
                self._shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
                self._types[value.name] = value.type.tensor_type.elem_type
        for weight in graph.initializer:
            self._shapes[weight.name] = tuple(weight.dims)
            self._types[weight.name] = weight.data_type
        self._half = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
        self._item_sizes = {kind: onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize for kind in self._types.values()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ValueError where the file does not tell it."""
        if name not in self._shapes:
            raise ValueError(f"the file does not tell the shape of {name}; export it again with `asag export`")
        return self._shapes[name]

    def item_size(self, name: str) -> int:
        """Bytes of one element."""
        self.shape(name)
        return self._item_sizes[self._types[name]]

    def bytes(self, name: str) -> int:
        """Bytes of the whole value."""
        return math.prod(self.shape(name)) * self.item_size(name)

    def is_half(self, name: str) -> bool:
        """Whether it has 16-bit floating-point elements."""
        return self._types.get(name) in self._half


def _with_batch(model: Any, batch_size: int) -> Any:
    """A copy whose one symbolic dimension is fixed; shapes that are not known whole are left to inference."""
    fixed = type(model)()
    fixed.CopyFrom(model)
    graph = fixed.graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_value = batch_size
    known = [value for value in graph.value_info if _is_known(value)]
    del graph.value_info[:]
    graph.value_info.extend(known)
    return fixed


def _is_known(value: Any) -> bool:
    tensor = value.type.tensor_type
    return tensor.HasField("shape") and all(dimension.HasField("dim_value") for dimension in tensor.shape.dim)


def node_operations(node: Any, values: GraphValues) -> float:
    """Floating-point operations of one node: two for each multiply-add."""
    if node.op_type == "Conv":
        weight = values.shape(node.input[1])
        return 2.0 * math.prod(values.shape(node.output[0])) * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return 2.0 * math.prod(values.shape(node.input[0])) * math.prod(values.shape(node.input[1])[1:])
    if node.op_type in ("MatMul", "Gemm"):
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        inner = values.shape(node.input[0])[-2 if transposed else -1]
        return 2.0 * math.prod(values.shape(node.output[0])) * inner
    operation = _custom_op(node)
    return 0.0 if operation is None else _work(operation, node, values).operations


def _custom_op(node: Any) -> Operation | None:
    from asag.trt_plugins.operations import DOMAIN, OPERATIONS

    return OPERATIONS.get(node.op_type) if node.domain == DOMAIN else None


def _work(operation: Operation, node: Any, values: GraphValues) -> Work:
    import onnx

    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return operation.work([values.shape(name) for name in node.input], attributes)


def _bytes(nodes: Sequence[Any], others: Sequence[Any], values: GraphValues) -> float:
    """Weights, inputs and outputs of the nodes of a stage, each once."""
    own = {name for node in nodes for name in node.output}
    whole = {name for node in nodes for name in _read(node)[_maps_sampled(node) :]} - own
    wanted = {name for node in others for name in _read(node)} | values.outputs
    sampled = sum(_sampled_bytes(node, values) for node in nodes)
    return sum(values.bytes(name) for name in whole | (own & wanted)) + sampled


def _read(node: Any) -> list[str]:
    """Values whose elements a node reads."""
    return [] if node.op_type == "Shape" else values_read(node)


def _maps_sampled(node: Any) -> int:
    """How many of its first inputs a node reads in places only."""
    operation = _custom_op(node)
    return 0 if operation is None else operation.sampled


def _sampled_bytes(node: Any, values: GraphValues) -> float:
    """What an op reads of the feature maps at most."""
    operation = _custom_op(node)
    if operation is None:
        return 0.0
    return _work(operation, node, values).map_values * values.item_size(node.input[0])
