"""The plugins in TensorRT's own protocol and registry, without a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from plugin_driver import TYPES, create, embed, with_expressions

from export.functions import OP_FUNCTIONS
from trt_plugins.bench import op_model
from trt_plugins.compile import compile_plan
from trt_plugins.plan import OPERATIONS, make_plan
from trt_plugins.plugins import name_plugins, register_plugins

CAPABILITY = 90
MAPS = [(None, 64, 40, 56), (None, 64, 20, 28), (None, 64, 10, 14), (None, 64, 5, 7)]
EXAMPLES: dict[str, tuple[list[tuple[int | None, ...]], dict[str, Any]]] = {
    "AdaptiveProbing": ([(None, 250, 5), (None, 250), (None, 8, 20, 28), (None, 2)], {"stride": 16, "capacity": 12}),
    "GatherAnchors": (
        [(None, 490, 5), (None, 490)],
        {"first": 250, "keep_threshold": float(np.float32(0.1)), "fewest": 5, "most": 200},
    ),
    "PyramidRoIAlign": ([*MAPS, (None, 200, 4)], {}),
    "SamplingMixing": ([*MAPS, (None, 200, 4, 16, 3), (None, 200, 4 * (16 * 16 + 32 * 16))], {"mixed_points": 32}),
}
KINDS = [
    (name, element, channels_last)
    for name, operation in OPERATIONS.items()
    for element in operation.elements
    for channels_last in ((False, True) if operation.has_pyramid else (False,))
]


@pytest.fixture
def trt(tensorrt: ModuleType, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    register_plugins(CAPABILITY)
    with_expressions(monkeypatch, tensorrt)
    return tensorrt


def test_creators_are_in_the_registry_with_the_attributes_of_the_onnx_bodies(trt: ModuleType) -> None:
    creators = {creator.name: creator for creator in trt.get_plugin_registry().all_creators}
    for function in OP_FUNCTIONS:
        proto, operation = function.to_function_proto(), OPERATIONS[function.name]
        assert [field.name for field in creators[function.name].field_names] == list(proto.attribute)
        assert [tensor.name for tensor in operation.inputs] == list(proto.input)
        assert len(operation.outputs) == len(proto.output)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "element", "channels_last"), KINDS)
def test_what_goes_into_an_engine_is_what_launch_uses(
    trt: ModuleType, name: str, element: str, channels_last: bool, batch: int
) -> None:
    shapes, attributes = EXAMPLES[name]
    plugin = create(trt, name, attributes)
    embedded = embed(trt, plugin, name, shapes, batch, element, channels_last)

    operation = OPERATIONS[name]
    numbers = [tuple(batch if side is None else side for side in shape) for shape in shapes]
    plan = make_plan(name, numbers, attributes, element, channels_last, tensor_cores=True)
    assert embedded.output_shapes == [tuple(shape) for shape in operation.output_shapes(numbers, attributes)]
    wanted = [getattr(trt.DataType, TYPES[tensor.resolve(element)]) for tensor in operation.outputs]
    assert embedded.output_types == wanted
    assert embedded.grid == plan.grid
    assert embedded.block == (plan.threads, 1, 1)
    assert embedded.shared_bytes == plan.shared_bytes
    assert embedded.scalars == plan.scalars
    assert embedded.kernel == plan.kernel
    assert embedded.image == compile_plan(plan, CAPABILITY, ptx=True).image.rstrip(b"\0")
    wanted_arguments = ["u64"] * len(operation.inputs) + ["u32"] * len(plan.scalars) + ["u64"] * len(operation.outputs)
    assert parameter_types(embedded.image.decode(), plan.kernel) == wanted_arguments


def parameter_types(ptx: str, kernel: str) -> list[str]:
    """Types of an entry point's parameters, as PTX declares them."""
    start = ptx.index(f".entry {kernel}(")
    return re.findall(r"\.param \.(\w+)", ptx[start : ptx.index(")", start)])


def test_a_symbolic_number_of_anchors_is_refused(trt: ModuleType) -> None:
    shapes, attributes = EXAMPLES["GatherAnchors"]
    plugin = create(trt, "GatherAnchors", attributes)
    with pytest.raises(ValueError, match="number of anchors must be fixed"):
        embed(trt, plugin, "GatherAnchors", [(None, None, 5), shapes[1]], 2)


def test_the_just_in_time_twin_exists_and_keeps_its_attributes(trt: ModuleType) -> None:
    attributes = EXAMPLES["SamplingMixing"][1]
    plugin = create(trt, "SamplingMixing", attributes, ahead_of_time=False)
    fields = {field.name: field.data for field in plugin.get_fields_to_serialize()}
    assert {name: int(value[0]) for name, value in fields.items()} == attributes


def test_registering_again_is_harmless_but_not_for_another_gpu(trt: ModuleType) -> None:
    assert register_plugins(CAPABILITY) == tuple(f"asag::{name}" for name in OPERATIONS)
    with pytest.raises(ValueError, match="start a new process"):
        register_plugins(75)


def test_named_nodes_still_run_in_onnx_runtime() -> None:
    attributes = {"first": 10, "keep_threshold": 0.1, "fewest": 2, "most": 5}
    model = op_model("GatherAnchors", [(2, 20, 5), (2, 20)], attributes)
    named = name_plugins(model)
    assert name_plugins(named) == named
    proto = onnx.ModelProto.FromString(named)
    onnx.checker.check_model(proto)
    assert helper.get_node_attr_value(proto.graph.node[0], "plugin_namespace") == b"asag"
    feed = {"anchors": np.random.default_rng(0).random((2, 20, 5), np.float32), "selectable": np.ones((2, 20), bool)}
    results = [
        onnxruntime.InferenceSession(text, providers=["CPUExecutionProvider"]).run(None, feed)
        for text in (model, named)
    ]
    np.testing.assert_array_equal(results[0][0], results[1][0])
