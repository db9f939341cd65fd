"""Convolutions of backbone and neck in int8: where the file quantizes and dequantizes, and with which steps.

The scheme is the one that TensorRT executes: symmetric, zero points 0, one step for each output channel of a weight and
one for each activation. Every other layer that bears rounding is float16 (`export.precision`). Weights and inputs of a
quantized layer are dequantized just before it; TensorRT makes one int8 convolution of the three.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from asag.export.foreign_precision import too_large
from asag.export.precision import LARGEST_FLOAT16, convert_precision, half_nodes
from asag.runtime.metadata import FOREIGN, ModelMetadata

LARGEST_INT8 = 127
"""Of -128..127 the symmetric part is used."""

PARAMETER_PREFIX = "detector."


def quantizable_layers(graph: onnx.GraphProto, metadata: ModelMetadata) -> dict[str, onnx.NodeProto]:
    """Convolutions of backbone and neck by the name of their parameters ("backbone.layer1.0.conv1"), in graph order."""
    constants = {tensor.name for tensor in graph.initializer}
    nodes = [graph.node[index] for index in sorted(half_nodes(graph, metadata))]
    return {
        node.input[1].removeprefix(PARAMETER_PREFIX).removesuffix(".weight"): node
        for node in nodes
        if node.op_type == "Conv" and node.input[1] in constants
    }


def int8_step(largest: NDArray | float) -> NDArray[np.float32]:
    """The smallest step (scale) of which 127 reach `largest`, as far as float16 has it; 1 where `largest` is 0.

    Scales are float16 in the finished file; as such a number here, the step rounds weights and activations the same
    way before and after that conversion.
    """
    exact = np.asarray(largest, np.float64) / LARGEST_INT8
    step = exact.astype(np.float16)
    step = np.where(step < exact, np.nextafter(step, np.float16(np.inf)), step)
    return np.where(exact == 0, 1, step).astype(np.float32)


def quantize_layers(
    proto: onnx.ModelProto, metadata: ModelMetadata, magnitudes: Mapping[str, float], layers: Collection[str]
) -> onnx.ModelProto:
    """A copy of `proto` (an export in float32) with `layers` in int8 and the rest as "fp16" of `export.precision`.

    layers: names of :func:`quantizable_layers`; magnitudes: the largest magnitude of each layer's input, see
    `export.calibration`. An activation is rounded for the layers in int8 that read it and for the sums of shortcuts
    beside them; whatever else reads it gets the unrounded value. Raises ValueError where a value does not fit float16.
    """
    nodes = {name: node for name, node in quantizable_layers(proto.graph, metadata).items() if name in layers}
    for name in sorted({value for node in nodes.values() for value in (node.input[0], node.output[0])}):
        if magnitudes[name] > LARGEST_FLOAT16:
            raise ValueError(
                f"activation {name} reaches {magnitudes[name]:.3g}, more than the float16 around int8 layers can hold;"
                " use bf16"
            )
    quantized = _with_dequantized_inputs(proto, magnitudes, nodes) if nodes else proto
    kept = too_large(proto.graph, magnitudes) if metadata.family == FOREIGN else ()
    return convert_precision(quantized, "fp16", metadata, kept)


def _with_dequantized_inputs(
    proto: onnx.ModelProto, magnitudes: Mapping[str, float], nodes: Mapping[str, onnx.NodeProto]
) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import TensorsData

    activations = {node.input[0] for node in nodes.values()}
    ranges = {name: (np.float32(-magnitudes[name]), np.float32(magnitudes[name])) for name in activations}
    quantizer = QDQQuantizer(
        model=proto,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=[node.name for node in nodes.values()],
        nodes_to_exclude=[],
        op_types_to_quantize=["Conv"],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["Conv"],  # so that TensorRT fuses bias, sum and ReLU after it
            "QuantizeBias": False,
            "QDQDisableWeightAdjustForInt32Bias": True,
            "TensorQuantOverrides": _steps(proto, magnitudes, nodes),
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    model: onnx.ModelProto = quantizer.model.model  # a copy, which the quantizer notes as its own
    note = [entry for entry in model.metadata_props if entry.key == "onnx.infer"]
    for entry in note:
        model.metadata_props.remove(entry)
    _read_unrounded(model.graph, {node.name for node in nodes.values()})
    model.producer_name, model.producer_version = proto.producer_name, proto.producer_version
    return onnx.shape_inference.infer_shapes(model)


def _steps(
    proto: onnx.ModelProto, magnitudes: Mapping[str, float], nodes: Mapping[str, onnx.NodeProto]
) -> dict[str, list[dict]]:
    """The quantizer's settings for each activation, and for each output channel of each weight."""
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    zero = np.int8(0)
    found: dict[str, list[dict]] = {}
    for node in nodes.values():
        value, weight = node.input[0], numpy_helper.to_array(weights[node.input[1]])
        found[value] = [{"scale": int8_step(magnitudes[value]), "zero_point": np.array(zero)}]
        largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)))
        found[node.input[1]] = [{"axis": 0, "scale": step, "zero_point": zero} for step in int8_step(largest)]
    return found


def _read_unrounded(graph: onnx.GraphProto, quantized: Collection[str]) -> None:
    """Undo for other readers that the quantizer gives the rounded value to all."""
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    rounded = {
        node.output[0]: source[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in source
    }
    for node in graph.node:
        if node.name not in quantized and node.op_type != "Add":
            node.input[:] = [rounded.get(name, name) for name in node.input]
