"""Which parts of an exported model compute in half precision, decided in the ONNX file.

Strongly typed engines take every type from the file, so the file is where precision is chosen. Two kinds of work hold
nearly all arithmetic and bear rounding well: the convolutions of backbone and neck, and the large linear layers, to
which a family may count convolutions behind them.
Everything else stays float32:

- boxes, `xyzr`, sampling points and position embeddings: a pixel of 1344 needs 11 bits before the fraction, which is
  all that float16 has, and three more than bfloat16 has;
- thresholds and suppression: a confidence that rounds across 0.1 or 0.7 changes which patches exist;
- norms, softmax and the geometry bias `log(iof + 1e-7)`, whose smallest value is below float16's normal range;
- the layers whose outputs are boxes, confidences and logits.

Where the features end is what the first stage of the forward pass names; which linear layers bear it is the family's
word. Both travel in the file's metadata. An adopted file has neither: :mod:`export.foreign_precision`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from asag.export.foreign_precision import bearing_nodes, data_inputs
from asag.export.operator_set import raise_operator_set, standard_operator_set
from asag.runtime.metadata import FOREIGN, ModelMetadata
from asag.runtime.stages.graph import HALF_ENDING, shown_values, values_read
from asag.trt_plugins.operations import DOMAIN, OPERATIONS

PRECISIONS = ("fp32", "fp16", "bf16")
"""What :func:`convert_precision` makes; int8 needs images to calibrate with, see `export.quantization`."""

BFLOAT16_OPERATOR_SET = 22
"""The first in which convolution and pooling take bfloat16. Files of other precisions keep the export's, which more
runtimes read.
"""

HALF_SCALES_OPERATOR_SET = 19
"""The first in which DequantizeLinear takes float16; in a file of an earlier one its result is cast."""

STATISTICS = ("InstanceNormalization", "GroupNormalization", "LayerNormalization", "ReduceMean")
"""Stay float32 among the features, too, with what is computed of them up to the next convolution: 16 bits lose the sums
over a whole map that a norm divides by.
"""

LAYOUT_OPERATORS = ("Flatten", "Reshape", "Transpose")

LARGEST_FLOAT16 = 65504.0


def convert_precision(
    proto: onnx.ModelProto, precision: str, metadata: ModelMetadata, kept: Collection[str] = ()
) -> onnx.ModelProto:
    """A copy of `proto` (an export in float32) in which backbone, neck and large linear layers compute in `precision`.

    metadata: the file's, with its stages and the linear layers that bear 16 bits; kept: values of an adopted file that
    stay float32, with what reads or makes them. Inputs and outputs keep their types.
    A quantized convolution keeps its int8 weights and activations; "fp16" halves the scales that it is dequantized
    with, and so what it computes in between. With "bf16" the operator set of the file becomes
    :data:`BFLOAT16_OPERATOR_SET`. Raises ValueError for an unknown precision, when a weight does not fit float16, and
    when nothing in the file can be converted.
    """
    if precision not in PRECISIONS:
        advice = "; int8 is made from a float32 file by `asag quantize`" if precision == "int8" else ""
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}{advice}")
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    if precision == "bf16":
        raise_operator_set(result, BFLOAT16_OPERATOR_SET)
    if precision != "fp32":
        half_type = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
        chosen = half_nodes(result.graph, metadata, kept)
        if standard_operator_set(result) < HALF_SCALES_OPERATOR_SET:
            chosen -= {place for place in chosen if result.graph.node[place].op_type == "DequantizeLinear"}
        _Converter(result.graph, half_type, chosen, kept).convert()
    return result


def half_nodes(graph: onnx.GraphProto, metadata: ModelMetadata, kept: Collection[str] = ()) -> set[int]:
    """Positions in `graph.node` of the nodes that compute in half precision; kept: see :func:`convert_precision`.

    Raises ValueError where there are none: the file would be what it was, under another name.
    """
    if metadata.family == FOREIGN:
        chosen = bearing_nodes(graph, kept)
    else:
        chosen = _feature_nodes(graph, metadata) | set(_half_linear(graph, metadata.half_layers))
    producer = {output: index for index, node in enumerate(graph.node) for output in node.output}
    chosen |= {
        source
        for index in chosen
        for name in graph.node[index].input
        if (source := producer.get(name)) is not None and graph.node[source].op_type == "DequantizeLinear"
    }
    if not chosen:
        raise ValueError("nothing in the file bears another precision: it names no features and no linear layers")
    return chosen | _laid_out_for(graph, chosen)


def _feature_nodes(graph: onnx.GraphProto, metadata: ModelMetadata) -> set[int]:
    """Backbone and neck, from the first convolution to what the first stage names, without norms."""
    producer = {output: index for index, node in enumerate(graph.node) for output in node.output}
    named = metadata.stages[0].value_names() if metadata.stages else ()
    features = _ancestors(graph, producer, set(shown_values(named, producer).values()))
    # What prepares the images stays float32: the features begin with the first convolution.
    after: set[str] = set()
    normed: set[str] = set()
    chosen: set[int] = set()
    for index in sorted(features):
        node = graph.node[index]
        if node.op_type == "Conv":
            after.update(node.output)
            chosen.add(index)
        elif node.op_type in STATISTICS or any(name in normed for name in node.input):
            normed.update(node.output)
        elif any(name in after for name in node.input):
            after.update(node.output)
            chosen.add(index)
    return chosen


def _laid_out_for(graph: onnx.GraphProto, chosen: set[int]) -> set[int]:
    """Nodes that do no more than lay out values for chosen nodes."""
    readers: dict[str, set[int]] = {value.name: {-1} for value in graph.output}
    for index, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, set()).add(index)
    found: set[int] = set()
    for index, node in reversed(list(enumerate(graph.node))):
        if node.op_type in LAYOUT_OPERATORS and readers.get(node.output[0], {-1}) <= chosen | found:
            found.add(index)
    return found - chosen


def _ancestors(graph: onnx.GraphProto, producer: dict[str, int], values: set[str]) -> set[int]:
    found: set[int] = set()
    pending = list(values)
    while pending:
        index = producer.get(pending.pop())
        if index is not None and index not in found:
            found.add(index)
            pending.extend(graph.node[index].input)
    return found


def _half_linear(graph: onnx.GraphProto, layers: Collection[str]) -> Iterator[int]:
    """Matrix products with a constant, named by the bias that is added to them (in float32), and convolutions."""
    constants = {tensor.name for tensor in graph.initializer}
    bias_of = {
        value: other
        for node in graph.node
        if node.op_type == "Add"
        for value, other in (tuple(node.input), tuple(reversed(node.input)))
        if other in constants
    }
    for index, node in enumerate(graph.node):
        name = ""
        if node.op_type == "MatMul" and node.input[1] in constants:
            name = bias_of.get(node.output[0], "")
        elif node.op_type == "Conv":
            name = node.input[1]
        if any(layer in name for layer in layers):
            yield index


class _Converter:
    """Rewrites one graph: half nodes get half inputs, and a cast back where something else reads what they give."""

    def __init__(self, graph: onnx.GraphProto, half_type: int, chosen: set[int], kept: Collection[str]) -> None:
        self.graph = graph
        self.kept = kept
        self.half_type = half_type
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.values = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
        self.chosen = chosen
        self.outputs = {value.name for value in graph.output}
        self.read_in_float = self.outputs | {
            name
            for index, node in enumerate(graph.node)
            for position, name in enumerate(node.input)
            if position not in self._half_inputs(index, node)
        }
        # What graphs inside nodes read keeps its name and type.
        self.read_in_float |= {name for node in graph.node for name in values_read(node) if name not in node.input}
        self.half_names: dict[str, str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def convert(self) -> None:
        for index, node in enumerate(self.graph.node):
            if half_inputs := self._half_inputs(index, node):
                self._convert_node(node, half_inputs)
            else:
                self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        self._drop_unused_initializers()
        self._update_value_types()

    def _half_inputs(self, index: int, node: onnx.NodeProto) -> Collection[int]:
        """Positions of the inputs that the node takes in half precision; empty for one that stays float32."""
        if index in self.chosen:
            return data_inputs(node)
        operation = OPERATIONS.get(node.op_type) if node.domain == DOMAIN else None
        if operation is None or any(name in self.kept for name in (*node.input, *node.output)):
            return ()
        return operation.half_inputs

    def _convert_node(self, node: onnx.NodeProto, half_inputs: Collection[int]) -> None:
        converted = onnx.NodeProto()
        converted.CopyFrom(node)
        converted.input[:] = [
            self._half(name) if position in half_inputs and self._is_float(name) else name
            for position, name in enumerate(node.input)
        ]
        float_outputs = [name for name in node.output if self._is_float(name)]
        converted.output[:] = [f"{name}{HALF_ENDING}" if name in float_outputs else name for name in node.output]
        self.nodes.append(converted)
        for name in float_outputs:
            self.half_names[name] = f"{name}{HALF_ENDING}"
            if name in self.read_in_float:
                self.nodes.append(
                    helper.make_node("Cast", [f"{name}{HALF_ENDING}"], [name], f"{name}_to_float", to=TensorProto.FLOAT)
                )

    def _half(self, name: str) -> str:
        """The half-precision twin of a float32 value, made when first asked for."""
        if name not in self.half_names:
            twin = self.half_names[name] = f"{name}{HALF_ENDING}"
            if name in self.initializers:
                self.graph.initializer.append(_to_half(self.initializers[name], twin, self.half_type))
            else:
                self.nodes.append(helper.make_node("Cast", [name], [twin], f"{name}_to_half", to=self.half_type))
        return self.half_names[name]

    def _is_float(self, name: str) -> bool:
        if name in self.initializers:
            return self.initializers[name].data_type == TensorProto.FLOAT
        return name in self.values and self.values[name].type.tensor_type.elem_type == TensorProto.FLOAT

    def _drop_unused_initializers(self) -> None:
        used = {name for node in self.nodes for name in values_read(node)}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def _update_value_types(self) -> None:
        """Types and shapes of values that are new, and none of values that are gone."""
        made = {name for node in self.nodes for name in node.output}
        kept = [value for value in self.graph.value_info if value.name in made]
        for name, twin in self.half_names.items():
            if twin in made and name in self.values:
                value = onnx.ValueInfoProto()
                value.CopyFrom(self.values[name])
                value.name = twin
                value.type.tensor_type.elem_type = self.half_type
                kept.append(value)
        del self.graph.value_info[:]
        self.graph.value_info.extend(kept)


def _to_half(tensor: onnx.TensorProto, name: str, half_type: int) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    if half_type == TensorProto.BFLOAT16:  # the range of float32
        return numpy_helper.from_array(values.astype(ml_dtypes.bfloat16), name)
    largest = float(np.abs(values).max(initial=0.0))
    if largest > LARGEST_FLOAT16:
        raise ValueError(f"weight {tensor.name} reaches {largest:.3g}, more than float16 can hold; keep fp32 or bf16")
    return numpy_helper.from_array(values.astype(np.float16), name)
