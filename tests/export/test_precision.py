"""Half precision, decided in the file."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from asag.deploy import DeployedDetector
from export.model import build_onnx
from export.precision import HALF_LINEAR_LAYERS, convert_precision, half_nodes
from tests.builders import random_detector, random_picture, small_info, uint8_batch

SIZE = (128, 160)


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    return build_onnx(DeployedDetector(random_detector(), small_info(SIZE)))


@pytest.fixture(scope="module")
def half(exported: onnx.ModelProto) -> onnx.ModelProto:
    return convert_precision(exported, "fp16")


def element_types(graph: onnx.GraphProto) -> dict[str, int]:
    values = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return values | {tensor.name: tensor.data_type for tensor in graph.initializer}


def run(model: onnx.ModelProto, batch: int = 2) -> dict[str, np.ndarray]:
    images, sizes = uint8_batch([random_picture(seed, *SIZE) for seed in range(batch)], *SIZE)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
    return dict(zip([value.name for value in session.get_outputs()], outputs, strict=True))


def test_every_feature_convolution_is_half_and_every_anchor_convolution_is_not(half: onnx.ModelProto) -> None:
    types = element_types(half.graph)
    convolutions = [node for node in half.graph.node if node.op_type == "Conv"]
    in_half = [node for node in convolutions if types[node.input[1]] == TensorProto.FLOAT16]
    anchor_layers = 3 * 2 + 1  # two for each of P3, P4 and P5, and the one of P6
    assert len(convolutions) - len(in_half) == anchor_layers
    assert all(types[node.input[0]] == types[node.output[0]] == TensorProto.FLOAT16 for node in in_half)


def test_only_listed_linear_layers_are_half(exported: onnx.ModelProto) -> None:
    biases = {
        name
        for index in half_nodes(exported.graph)
        if (node := exported.graph.node[index]).op_type == "MatMul"
        for add in exported.graph.node
        if add.op_type == "Add" and node.output[0] in add.input
        for name in add.input
        if name.endswith("bias")
    }
    assert biases
    assert all(any(layer in name for layer in HALF_LINEAR_LAYERS) for name in biases)
    assert {layer for layer in HALF_LINEAR_LAYERS if any(layer in name for name in biases)} == set(HALF_LINEAR_LAYERS)


@pytest.mark.parametrize("operator", ["LayerNormalization", "Softmax", "Log", "Sin", "Sigmoid", "TopK"])
def test_geometry_norms_and_thresholds_stay_float32(half: onnx.ModelProto, operator: str) -> None:
    types = element_types(half.graph)
    nodes = [node for node in half.graph.node if node.op_type == operator]
    assert nodes
    assert all(types.get(name) != TensorProto.FLOAT16 for node in nodes for name in (*node.input, *node.output))


def test_types_are_consistent_and_the_contract_stays(exported: onnx.ModelProto, half: onnx.ModelProto) -> None:
    onnx.checker.check_model(half)
    # Strict inference compares the recorded type of every value with the one its operator gives.
    onnx.shape_inference.infer_shapes(half, check_type=True, strict_mode=True)
    assert list(half.graph.input) == list(exported.graph.input)
    assert list(half.graph.output) == list(exported.graph.output)


def test_detections_survive(exported: onnx.ModelProto, half: onnx.ModelProto) -> None:
    reference, candidate = run(exported), run(half)
    assert not np.array_equal(reference["scores"], candidate["scores"])  # something was rounded
    np.testing.assert_allclose(candidate["scores"], reference["scores"], atol=0.05)
    assert candidate["scores"].dtype == np.float32


def test_float32_is_a_plain_copy(exported: onnx.ModelProto) -> None:
    assert convert_precision(exported, "fp32").SerializeToString() == exported.SerializeToString()


def test_a_weight_beyond_float16_is_refused(exported: onnx.ModelProto) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    weight = next(node for node in model.graph.node if node.op_type == "Conv").input[1]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = 1e5
    tensor.CopyFrom(numpy_helper.from_array(values, weight))
    with pytest.raises(ValueError, match="more than float16 can hold"):
        convert_precision(model, "fp16")


def test_an_unknown_precision_is_named(exported: onnx.ModelProto) -> None:
    with pytest.raises(ValueError, match="precision is 'int3'"):
        convert_precision(exported, "int3")
