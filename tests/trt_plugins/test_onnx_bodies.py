"""The ops' ONNX bodies in ONNX Runtime against the PyTorch definitions, on the inputs that the kernels are tried on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
from onnx import helper

from asag.export.op_bodies import HELPER_FUNCTIONS, bodies_of
from asag.export.op_bodies.domain import OPSET_VERSION
from asag.ops import (
    adaptive_probing_definition,
    deformable_attention_definition,
    gather_anchors_definition,
    pyramid_roi_align_definition,
    sample_grid_definition,
    sampling_mixing_definition,
    select_tokens_definition,
)
from asag.runtime.engines.backend import TENSORRT_RTX
from asag.runtime.errors import BackendUnavailableError
from asag.trt_plugins.operations import DOMAIN, OPERATIONS
from benchmarks.kernel_cases import DEMO, op_model, signature
from tests.trt_plugins.kernel_cases import (
    LEVELS,
    RELU_IN_PIXELS,
    SAMPLINGS,
    Array,
    attention_inputs,
    grid_inputs,
    mixing_inputs,
    probing_inputs,
    pyramid,
    roi_boxes,
    scores_with_ties,
    tensors,
)


def run_body(
    name: str,
    inputs: list[Array],
    attributes: dict[str, Any] | None = None,
    element: str = "float32",
    operator_set: int = OPSET_VERSION,
) -> list[Array]:
    """The op as the only node of a model; what is of the maps' type is rounded to `element` first."""
    kinds = [tensor.resolve(element) for tensor in OPERATIONS[name].inputs]
    inputs = [array.astype(kind) for array, kind in zip(inputs, kinds, strict=True)]
    proto = onnx.ModelProto.FromString(op_model(name, [array.shape for array in inputs], attributes or {}, element))
    for owner in (proto, *proto.functions):
        (standard,) = (entry for entry in owner.opset_import if entry.domain == "")
        standard.version = operator_set
    onnx.checker.check_model(proto)
    if operator_set != OPSET_VERSION:
        proto = onnx.inliner.inline_local_functions(proto)
        onnx.checker.check_model(proto, full_check=True)
    model = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


@pytest.mark.parametrize("capacity", [1, 5, 40])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("cells", [(26, 25), (1, 1)])
def test_adaptive_probing(cells: tuple[int, int], coarse: bool, capacity: int) -> None:
    inputs = probing_inputs(4, count=120, cells=cells, coarse=coarse)
    inputs[0][:, ::5, 4] = np.nan
    actual = run_body("AdaptiveProbing", inputs, {"stride": 16, "capacity": capacity})
    expected = adaptive_probing_definition(*tensors(*inputs), 16, capacity)
    for name, one, other in zip(expected._fields, actual, expected, strict=True):
        np.testing.assert_array_equal(one, other.numpy(), err_msg=name)


@pytest.mark.parametrize(("fewest", "most"), [(5, 20), (40, 100), (40, 20)])
@pytest.mark.parametrize("threshold", [0.1, 0.6])
@pytest.mark.parametrize("coarse", [False, True])
def test_gather_anchors(coarse: bool, threshold: float, fewest: int, most: int) -> None:
    anchors, valid, _, _ = probing_inputs(4, count=160, coarse=coarse)
    anchors[:, ::5, 4] = np.nan
    attributes = {"first": 60, "keep_threshold": threshold, "fewest": fewest, "most": most}
    actual = run_body("GatherAnchors", [anchors, valid], attributes)
    expected = gather_anchors_definition(*tensors(anchors, valid), *attributes.values())  # type: ignore[arg-type]
    np.testing.assert_array_equal(actual[0], expected[0].numpy())
    np.testing.assert_array_equal(actual[1], expected[1].numpy())


@pytest.mark.parametrize("finest", [(40, 56), (3, 5), (1, 1)])
def test_pyramid_roi_align(finest: tuple[int, int]) -> None:
    random = np.random.default_rng(2)
    inputs = [*pyramid(random, 2, 8, finest), roi_boxes(random, 2, 20, 200)]
    expected = pyramid_roi_align_definition(*tensors(*inputs)).numpy()
    np.testing.assert_allclose(run_body("PyramidRoIAlign", inputs)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("finest", [(16, 24), (3, 5), (1, 1)])
def test_sampling_mixing(finest: tuple[int, int]) -> None:
    inputs = mixing_inputs(2, 2, 3, (4, 16, 16, 32), finest)
    expected = sampling_mixing_definition(*tensors(*inputs), 32).numpy()
    actual = run_body("SamplingMixing", inputs, {"mixed_points": 32})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attributes", [RELU_IN_PIXELS, {"activation": 1}, {"point_unit": 1}])
def test_sampling_mixing_with_another_activation_and_unit(attributes: dict[str, int]) -> None:
    inputs = mixing_inputs(2, 2, 3, (4, 16, 16, 32), (16, 24), attributes.get("point_unit", 4))
    expected = sampling_mixing_definition(*tensors(*inputs), 32, **attributes).numpy()
    actual = run_body("SamplingMixing", inputs, {"mixed_points": 32, **attributes})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 3])
def test_deformable_attention(heads: int) -> None:
    inputs = attention_inputs(2, heads=heads)
    expected = deformable_attention_definition(*tensors(*inputs), **LEVELS).numpy()
    actual = run_body("MultiScaleDeformableAttention", inputs, LEVELS)[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [(0, 9), (40, 1)])
def test_select_tokens(counts: tuple[int, int]) -> None:
    inputs = [scores_with_ties(2, 2, 100), np.array(counts)]
    expected = select_tokens_definition(*tensors(*inputs), 30)
    for one, other in zip(run_body("SelectTokens", inputs, {"capacity": 30}), expected, strict=True):
        np.testing.assert_array_equal(one, other.numpy())


@pytest.mark.parametrize("operator_set", range(16, 24))
def test_bodies_that_other_tools_files_may_get(operator_set: int) -> None:
    """The files' operator sets are not the exporter's; a body that is inlined must mean the same in them."""
    cases: list[tuple[str, list[Array], dict[str, Any]]] = [
        ("MultiScaleDeformableAttention", attention_inputs(), LEVELS),
        ("SelectTokens", [scores_with_ties(0, 2, 60), np.array([7, 3])], {"capacity": 7}),
        *(("SampleGrid", grid_inputs(), attributes) for attributes in SAMPLINGS),
    ]
    for name, inputs, attributes in cases:
        found, expected = (run_body(name, inputs, attributes, "float32", number) for number in (operator_set, 20))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["MultiScaleDeformableAttention", "SelectTokens", "SampleGrid"])
def test_bodies_build_in_tensorrt_rtx(name: str) -> None:
    """Its builder needs no GPU and says which operators it lacks."""
    try:
        trt = TENSORRT_RTX.load()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    model = onnx.inliner.inline_local_functions(onnx.ModelProto.FromString(op_model(name, *signature(name, DEMO))))
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()
    assert builder.build_serialized_network(network, builder.create_builder_config()) is not None


@pytest.mark.parametrize("operator_set", [16, 20, 22])
@pytest.mark.parametrize("attributes", SAMPLINGS)
def test_sample_grid_is_the_standard_operator(attributes: dict[str, int], operator_set: int) -> None:
    """But for places far outside and what is no number, for which runtimes differ."""
    value, grid = grid_inputs(value=(2, 3, 5, 1), places=(40, 3))
    grid = np.where(np.abs(grid) < 2, grid, 0.3)
    node = helper.make_node(
        "GridSample",
        ["value", "grid"],
        ["samples"],
        mode="bilinear" if operator_set < 20 else "linear",
        padding_mode=("zeros", "border")[attributes["padding"]],
        align_corners=attributes["align_corners"],
    )
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("value", value.shape), ("grid", grid.shape), ("samples", (2, 3, 40, 3)))
    ]
    graph = helper.make_graph([node], "sampling", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", operator_set)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"value": value, "grid": grid})
    found = run_body("SampleGrid", [value, grid], attributes, "float32", operator_set)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_one_file_has_one_body_of_an_op() -> None:
    nodes = [
        helper.make_node("SamplingMixing", [], [], domain=DOMAIN, mixed_points=8, **attributes)
        for attributes in ({}, {"point_unit": 1}, {"activation": 1})
    ]
    names = [function.name for function in HELPER_FUNCTIONS]
    assert bodies_of([]) == []
    assert [function.name for function in bodies_of(nodes[:2])] == ["SamplingMixing", *names]
    with pytest.raises(ValueError, match="nodes of SamplingMixing with attributes that need different bodies"):
        bodies_of(nodes)


def test_maps_of_half_precision() -> None:
    """The bodies take float16 maps and parameters, compute in float32 and give float16, as the kernels do."""
    probing = probing_inputs(4, count=120)
    patches = run_body("AdaptiveProbing", probing, {"stride": 16, "capacity": 5}, "float16")[0]
    expected = adaptive_probing_definition(*tensors(*probing), 16, 5).patches.numpy()
    assert patches.dtype == np.float16
    np.testing.assert_array_equal(patches, expected.astype(np.float16))

    random = np.random.default_rng(2)
    aligning = [*pyramid(random, 2, 8, (40, 56)), roi_boxes(random, 2, 20, 200)]
    mixing = mixing_inputs(2, 2, 3, (4, 16, 16, 32), (16, 24))
    for name, inputs, attributes, definition in (
        ("PyramidRoIAlign", aligning, {}, pyramid_roi_align_definition),
        ("SamplingMixing", mixing, {"mixed_points": 32}, sampling_mixing_definition),
        ("MultiScaleDeformableAttention", attention_inputs(), LEVELS, deformable_attention_definition),
        ("SampleGrid", grid_inputs(), SAMPLINGS[1], sample_grid_definition),
    ):
        actual = run_body(name, inputs, attributes, "float16")[0]
        kinds = [tensor.resolve("float16") for tensor in OPERATIONS[name].inputs]
        rounded = [array.astype(kind).astype(np.float32) for array, kind in zip(inputs, kinds, strict=True)]
        expected = definition(*tensors(*rounded), *attributes.values()).numpy()  # type: ignore[operator]
        assert actual.dtype == np.float16
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3, err_msg=name)
