"""Half precision, decided in the file: float16 and bfloat16."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, defs, helper, numpy_helper

from asag.deploy import DeployedDetector
from asag.export import emulation
from asag.export.emulation import emulate_bfloat16
from asag.export.operator_set import is_widened, operators, raise_operator_set
from asag.export.precision import BFLOAT16_OPERATOR_SET, convert_precision, half_nodes
from asag.family import Stage, Value
from asag.runtime.errors import BackendUnavailableError
from asag.runtime.opening import open_session
from asag.runtime.stages.graph import made_by, shown_values
from asag.trt_plugins.operations import OPERATIONS
from tests.builders import random_picture, small_info, uint8_batch
from tests.exports import small_export

SIZE = small_info().input.size


@pytest.fixture(scope="module")
def deployed() -> DeployedDetector:
    return small_export().deployed


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    return small_export().proto


def convert(proto: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    return convert_precision(proto, precision, small_export().metadata)


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def half(exported: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    return convert(exported, precision)


@pytest.fixture(scope="module")
def half_type(precision: str) -> int:
    return {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]


def element_types(graph: onnx.GraphProto) -> dict[str, int]:
    values = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return values | {tensor.name: tensor.data_type for tensor in graph.initializer}


def run(model: onnx.ModelProto, batch: int = 2) -> dict[str, np.ndarray]:
    images, sizes = uint8_batch([random_picture(seed, *SIZE) for seed in range(batch)], *SIZE)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
    return dict(zip([value.name for value in session.get_outputs()], outputs, strict=True))


def test_every_feature_convolution_is_half_and_every_anchor_convolution_is_not(
    half: onnx.ModelProto, half_type: int
) -> None:
    types = element_types(half.graph)
    convolutions = [node for node in half.graph.node if node.op_type == "Conv"]
    in_half = [node for node in convolutions if types[node.input[1]] == half_type]
    anchor_layers = 3 * 2 + 1  # two for each of P3, P4 and P5, and the one of P6
    assert len(convolutions) - len(in_half) == anchor_layers
    assert all(types[node.input[0]] == types[node.output[0]] == half_type for node in in_half)


def test_only_listed_linear_layers_are_half(exported: onnx.ModelProto) -> None:
    biases = {
        name
        for index in half_nodes(exported.graph, small_export().metadata)
        if (node := exported.graph.node[index]).op_type == "MatMul"
        for add in exported.graph.node
        if add.op_type == "Add" and node.output[0] in add.input
        for name in add.input
        if name.endswith("bias")
    }
    assert biases
    listed = small_export().metadata.half_layers
    assert all(any(layer in name for layer in listed) for name in biases)
    # The list is the family's: this detector has not all of them.
    parameters = small_export().detector.state_dict()
    existing = {layer for layer in listed if any(layer in name for name in parameters)}
    assert {layer for layer in listed if any(layer in name for name in biases)} == existing


def test_the_pyramids_ops_take_maps_and_parameters_in_half_and_give_half(half: onnx.ModelProto, half_type: int) -> None:
    types = element_types(half.graph)
    for name in ("PyramidRoIAlign", "SamplingMixing"):
        half_inputs = OPERATIONS[name].half_inputs
        (node,) = (node for node in half.graph.node if node.op_type == name)
        found = [types[value] for value in node.input]
        assert found == [half_type if at in half_inputs else TensorProto.FLOAT for at in range(len(found))]
        assert types[node.output[0]] == half_type
        # A linear layer in half precision reads the result, and nothing takes it back to float32 before.
        value, read_by = node.output[0], ""
        while read_by != "MatMul":
            (reader,) = (reader for reader in half.graph.node if value in reader.input)
            value, read_by = reader.output[0], reader.op_type
            assert read_by in ("MatMul", "Reshape", "Flatten")


@pytest.mark.parametrize("operator", ["LayerNormalization", "Softmax", "Log", "Sin", "Sigmoid", "TopK"])
def test_geometry_norms_and_thresholds_stay_float32(half: onnx.ModelProto, half_type: int, operator: str) -> None:
    types = element_types(half.graph)
    nodes = [node for node in half.graph.node if node.op_type == operator]
    assert nodes
    assert all(types.get(name) != half_type for node in nodes for name in (*node.input, *node.output))


def test_types_are_consistent_and_the_contract_stays(exported: onnx.ModelProto, half: onnx.ModelProto) -> None:
    onnx.checker.check_model(half, full_check=True)
    onnx.checker.check_model(onnx.inliner.inline_local_functions(half), full_check=True)
    # Strict inference compares the recorded type of every value with the one its operator gives.
    onnx.shape_inference.infer_shapes(half, check_type=True, strict_mode=True)
    assert list(half.graph.input) == list(exported.graph.input)
    assert list(half.graph.output) == list(exported.graph.output)


def test_detections_survive(exported: onnx.ModelProto, half: onnx.ModelProto, precision: str) -> None:
    reference = run(exported)
    candidate = run(half if precision == "fp16" else emulate_bfloat16(half, small_export().metadata))
    assert not np.array_equal(reference["scores"], candidate["scores"])  # something was rounded
    # bfloat16 decides a proposal or two otherwise, which moves the scores after the best by a place.
    best = slice(None) if precision == "fp16" else slice(10)
    np.testing.assert_allclose(candidate["scores"][:, best], reference["scores"][:, best], atol=0.05)
    assert candidate["scores"].dtype == np.float32


def test_float32_is_a_plain_copy(exported: onnx.ModelProto) -> None:
    assert convert(exported, "fp32").SerializeToString() == exported.SerializeToString()


def test_a_weight_beyond_float16_is_refused(exported: onnx.ModelProto) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    weight = next(node for node in model.graph.node if node.op_type == "Conv").input[1]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = 1e5
    tensor.CopyFrom(numpy_helper.from_array(values, weight))
    with pytest.raises(ValueError, match="more than float16 can hold"):
        convert(model, "fp16")
    assert convert(model, "bf16").graph.node  # which has the range of float32


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_graph_in_which_nothing_can_be_converted_is_refused(exported: onnx.ModelProto, precision: str) -> None:
    """The file would be what it was, under another name."""
    nothing = dataclasses.replace(small_export().metadata, stages=(), half_layers=())
    with pytest.raises(ValueError, match="nothing in the file bears another precision: it names no features and no"):
        convert_precision(exported, precision, nothing)
    other = dataclasses.replace(nothing, stages=(Stage("features", (Value("p9", "maps"),)),), half_layers=("colour",))
    with pytest.raises(ValueError, match="nothing in the file bears another precision"):
        convert_precision(exported, precision, other)
    assert convert_precision(exported, "fp32", nothing) == exported


def test_an_unknown_precision_is_named(exported: onnx.ModelProto) -> None:
    with pytest.raises(ValueError, match="precision is 'int3'"):
        convert(exported, "int3")


def test_int8_is_sent_to_its_command(exported: onnx.ModelProto) -> None:
    with pytest.raises(ValueError, match="asag quantize"):
        convert(exported, "int8")


def test_bfloat16_weights_are_rounded_to_the_nearest(exported: onnx.ModelProto) -> None:
    converted = {tensor.name: tensor for tensor in convert(exported, "bf16").graph.initializer}
    original = {tensor.name: numpy_helper.to_array(tensor) for tensor in exported.graph.initializer}
    rounded = [tensor for tensor in converted.values() if tensor.data_type == TensorProto.BFLOAT16]
    assert len(rounded) > 40
    for tensor in rounded:
        exact, value = original[tensor.name.removesuffix("_half")], numpy_helper.to_array(tensor)
        spacing = np.maximum(np.abs(exact) * 2.0**-7, 1e-38)  # 8 bits, the first of them implied
        assert (np.abs(value.astype(np.float32) - exact) <= spacing / 2).all()
        below, above = np.nextafter(value, ml_dtypes.bfloat16(-np.inf)), np.nextafter(value, ml_dtypes.bfloat16(np.inf))
        for other in (below, above):
            assert (np.abs(value.astype(np.float64) - exact) <= np.abs(other.astype(np.float64) - exact)).all()


def test_only_bfloat16_raises_the_operator_set(exported: onnx.ModelProto) -> None:
    def versions(model: onnx.ModelProto) -> set[int]:
        owners = (model, *model.functions)
        return {entry.version for owner in owners for entry in owner.opset_import if entry.domain == ""}

    assert versions(convert(exported, "fp16")) == versions(exported) == {20}
    raised = convert(exported, "bf16")
    assert versions(raised) == {BFLOAT16_OPERATOR_SET}
    assert len(raised.functions) == len(exported.functions)


@pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 22),
    reason=f"ONNX Runtime {onnxruntime.__version__} does not read operator set {BFLOAT16_OPERATOR_SET}",
)
def test_the_later_operator_set_computes_the_same(exported: onnx.ModelProto) -> None:
    later = onnx.ModelProto()
    later.CopyFrom(exported)
    raise_operator_set(later, BFLOAT16_OPERATOR_SET)
    for name, value in run(exported).items():
        np.testing.assert_array_equal(run(later)[name], value)


def test_operators_that_change_are_refused(exported: onnx.ModelProto) -> None:
    used = operators(exported.graph.node).union(*(operators(function.node) for function in exported.functions))
    assert {"Conv", "Loop", "MaxPool", "Resize"} <= used
    assert all(is_widened(name, 20, BFLOAT16_OPERATOR_SET) for name in used)
    # MaxPool says more of ceil_mode, and no export has it.
    pooling = [node for node in exported.graph.node if node.op_type == "MaxPool"]
    assert all(attribute.name != "ceil_mode" or not attribute.i for node in pooling for attribute in node.attribute)
    # Operators with a new attribute, a new input, another default.
    assert defs.get_schema("QuantizeLinear", 21).since_version == 21
    assert not is_widened("QuantizeLinear", 19, 21)
    assert not is_widened("ReduceMax", 13, 18)
    assert not is_widened("Softmax", 11, 13)
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["": 19]> g (float[4] x, float s, int8 z) => (int8[4] y)
        { y = QuantizeLinear(x, s, z) }"""
    )
    with pytest.raises(ValueError, match="operator QuantizeLinear differs between operator sets 19 and 22"):
        raise_operator_set(model, 22)
    with pytest.raises(ValueError, match="the file has operator set 19, later than 18"):
        raise_operator_set(model, 18)


@torch.no_grad()
def test_emulated_features_are_those_of_pytorch_in_bfloat16(
    deployed: DeployedDetector, exported: onnx.ModelProto
) -> None:
    images, sizes = uint8_batch([random_picture(seed, *SIZE) for seed in range(2)], *SIZE)
    emulated = emulate_bfloat16(convert(exported, "bf16"), small_export().metadata)
    named = small_export().metadata.stages[0].value_names()
    names = list(shown_values(named, made_by(emulated.graph.node)).values())
    for name in names:
        emulated.graph.output.add().name = name
    session = onnxruntime.InferenceSession(emulated.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(list(names), {"images": images.numpy(), "sizes": sizes.numpy()})
    normalized = deployed.normalize(images, sizes)
    exact = deployed.detector.features(normalized)
    expected = copy.deepcopy(deployed.detector).bfloat16().features(normalized.bfloat16())
    for value, reference, unrounded in zip(found, expected, exact, strict=True):
        error = np.abs(value - reference.numpy()).mean()
        rounding = (unrounded - reference).abs().mean().item()
        # Sums are rounded in another order here and there; what bfloat16 changes is many times that.
        assert 0 < rounding < 0.02 * unrounded.abs().mean().item() + 0.02
        assert error < 0.5 * rounding


def test_a_session_says_what_a_bfloat16_file_needs(exported: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = convert(exported, "bf16")
    helper.set_model_props(model, dataclasses.replace(small_export().metadata, precision="bf16").to_properties())
    onnx.save(model, path)
    with pytest.raises(BackendUnavailableError, match=r"model\.onnx is bf16, in which this ONNX Runtime has no conv"):
        open_session(path)
    done = CliRunner().invoke(emulation.main, [str(path), "-o", str(tmp_path / "emulated.onnx")])
    assert done.exit_code == 0, done.output
    with open_session(tmp_path / "emulated.onnx") as session:
        assert session.precision == "bf16 emulated"
        assert len(session.detect([random_picture(0, *SIZE)])[0]) > 0
    again = CliRunner().invoke(emulation.main, [str(tmp_path / "emulated.onnx"), "-o", str(tmp_path / "twice.onnx")])
    assert again.exit_code == 1
    assert "is bf16 emulated; export it with --precision bf16" in again.output
    assert not (tmp_path / "twice.onnx").exists()
