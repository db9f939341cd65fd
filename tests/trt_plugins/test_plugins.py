"""The plugins in TensorRT's own protocol and registry, without a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from asag.export.op_bodies import OP_FUNCTIONS
from asag.trt_plugins.compile import compile_plan
from asag.trt_plugins.launch import prepare_call
from asag.trt_plugins.operations import DOMAIN, OPERATIONS
from asag.trt_plugins.plan import make_plan
from asag.trt_plugins.plugins import register_plugins
from tests.trt_plugins.plugin_driver import TYPES, create, embed, with_expressions

CAPABILITY = 90
MAPS = [(None, 64, 40, 56), (None, 64, 20, 28), (None, 64, 10, 14), (None, 64, 5, 7)]
MIXING = {"mixed_points": 32, "activation": 1, "point_unit": 1}
EXAMPLES: dict[str, tuple[list[tuple[int | None, ...]], dict[str, Any]]] = {
    "AdaptiveProbing": ([(None, 250, 5), (None, 250), (None, 8, 20, 28), (None, 2)], {"stride": 16, "capacity": 12}),
    "GatherAnchors": (
        [(None, 490, 5), (None, 490)],
        {"first": 250, "keep_threshold": float(np.float32(0.1)), "fewest": 5, "most": 200},
    ),
    "PyramidRoIAlign": ([*MAPS, (None, 200, 4)], {"maps": 3, "first_stride": 8}),
    "SamplingMixing": ([*MAPS, (None, 200, 4, 16, 3), (None, 200, 4 * (16 * 16 + 32 * 16))], MIXING),
    "MultiScaleDeformableAttention": (
        [(None, 80, 4, 16), (None, 30, 4, 5, 2), (None, 30, 4, 5)],
        {"level_shapes": (8, 9, 2, 4), "level_points": (3, 2)},
    ),
    "SelectTokens": ([(None, 300), (None,)], {"capacity": 31}),
    "SampleGrid": ([(None, 24, 8, 9), (None, 30, 4, 2)], {"padding": 0, "align_corners": 1}),
}
USED = ("AdaptiveProbing", "GatherAnchors", "PyramidRoIAlign", "SamplingMixing")
"""The ops of the exported detector."""
KINDS = [
    (name, element, channels_last)
    for name, operation in OPERATIONS.items()
    for element in operation.elements
    for channels_last in ((False, True) if operation.maps else (False,))
]


@pytest.fixture
def trt(tensorrt: ModuleType, compiler: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    register_plugins(CAPABILITY)
    with_expressions(monkeypatch, tensorrt)
    return tensorrt


def test_creators_are_in_the_registry_with_the_attributes_of_the_onnx_bodies(trt: ModuleType) -> None:
    creators = {creator.name: creator for creator in trt.get_plugin_registry().all_creators}
    for function in OP_FUNCTIONS:
        proto, operation = function.to_function_proto(), OPERATIONS[function.name]
        attributes = [*proto.attribute, *(each.name for each in proto.attribute_proto)]
        assert [field.name for field in creators[function.name].field_names] == attributes
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
    assert embedded.shared_bytes == 0
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


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_just_in_time_twin_launches_on_tensorrts_memory(
    trt: ModuleType, monkeypatch: pytest.MonkeyPatch, channels_last: bool
) -> None:
    launches = []
    monkeypatch.setattr("asag.trt_plugins.plugins.launch", lambda *arguments: launches.append(arguments))
    shapes, attributes = EXAMPLES["SamplingMixing"]
    numbers = [tuple(2 if side is None else side for side in shape) for shape in shapes]
    operation = OPERATIONS["SamplingMixing"]
    plugin = create(trt, "SamplingMixing", attributes, ahead_of_time=False)
    kinds = [getattr(trt.DataType, TYPES[tensor.resolve("bfloat16")]) for tensor in operation.inputs]
    plugin.get_output_data_types(kinds, [len(shape) for shape in numbers])
    descriptions = []
    for tensor, shape, kind in zip(operation.inputs, numbers, kinds, strict=True):
        description = trt.PluginTensorDesc()
        description.dims, description.type = trt.Dims(shape), kind
        last = channels_last and tensor.pyramid
        description.format = trt.TensorFormat.HWC8 if last else trt.TensorFormat.LINEAR
        descriptions.append(description)
    (result_shape,) = operation.output_shapes(numbers, attributes)
    result = trt.PluginTensorDesc()
    result.dims, result.type, result.format = trt.Dims(result_shape), trt.DataType.BF16, trt.TensorFormat.LINEAR
    pointers = [4096 * index for index in range(1, 7)]
    strides = [(0,) * len(shape) for shape in numbers]
    plugin.enqueue(descriptions, [result], pointers, [1 << 20], strides, [(0, 0, 0)], 77)

    ((name, inputs, outputs, values, stream),) = launches
    assert (name, values, stream) == ("SamplingMixing", attributes, 77)
    call = prepare_call(name, inputs, outputs, values, tensor_cores=True)
    assert (call.inputs, call.outputs) == (tuple(pointers), (1 << 20,))
    assert call.plan == make_plan(name, numbers, attributes, "bfloat16", channels_last, tensor_cores=True)


def test_registering_again_is_harmless_but_not_for_another_gpu(trt: ModuleType) -> None:
    assert register_plugins(CAPABILITY) == tuple(f"asag::{name}" for name in OPERATIONS)
    with pytest.raises(ValueError, match="start a new process"):
        register_plugins(75)


def test_every_node_of_an_exported_detector_becomes_a_plugin(trt: ModuleType, exported: Path) -> None:
    model = onnx.load(exported)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    shapes = {
        value.name: [None if side.dim_param else side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in values
    }
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert {node.op_type for node in nodes} == set(USED)
    for node in nodes:
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert given.pop("plugin_namespace") == b"asag"
        # The parser hands over attributes in the order of the creator's fields.
        attributes = {name: given.pop(name) for name, _ in OPERATIONS[node.op_type].attributes}
        assert not given
        plugin = create(trt, node.op_type, attributes)
        embedded = embed(trt, plugin, node.op_type, [shapes[name] for name in node.input], batch=2)
        for name, shape in zip(node.output, embedded.output_shapes, strict=True):
            assert shape == tuple(2 if side is None else side for side in shapes[name]), name
