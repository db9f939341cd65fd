"""An op is described once; its definition, its body and its kernel say the same."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper

import asag.ops
import asag.trt_plugins
from asag.export.op_bodies import OP_FUNCTIONS
from asag.export.operators import translation_table
from asag.ops.cuda import find_definition
from asag.ops.sampling_mixing import ACTIVATIONS as DEFINED
from asag.trt_plugins.operations import DOMAIN, OPERATIONS, Operation
from asag.trt_plugins.operations.sampling_mixing import ACTIVATIONS

by_name = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


@by_name
def test_definition_and_body_have_the_names_of_the_description(operation: Operation) -> None:
    inputs, attributes = [tensor.name for tensor in operation.inputs], [name for name, _ in operation.attributes]
    assert list(inspect.signature(find_definition(operation)).parameters) == [*inputs, *attributes]
    (body,) = (function.to_function_proto() for function in OP_FUNCTIONS if function.name == operation.name)
    defaults = {each.name: helper.get_attribute_value(each) for each in body.attribute_proto}
    assert (body.domain, list(body.input), [*body.attribute, *defaults]) == (DOMAIN, inputs, attributes)
    assert (
        defaults
        == operation.defaults
        == {
            name: parameter.default
            for name, parameter in inspect.signature(find_definition(operation)).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
    )
    assert len(body.output) == len(operation.outputs)


@by_name
def test_its_first_inputs_are_the_maps(operation: Operation) -> None:
    assert [tensor.pyramid for tensor in operation.inputs[: operation.maps]] == [True] * operation.maps
    assert {operation.inputs[position].type for position in operation.half_inputs} <= {"element"}
    read_in_places = [tensor.pyramid or tensor.sampled for tensor in operation.inputs[: operation.sampled]]
    assert all(read_in_places)
    assert operation.maps in (0, operation.sampled)
    assert set(range(operation.sampled)) <= set(operation.half_inputs)


def test_nothing_is_without_a_description() -> None:
    names = sorted(operation.snake_name for operation in OPERATIONS.values())
    kernels = (Path(asag.trt_plugins.__file__).parent / "kernels").glob("*.cu")
    assert sorted(path.stem for path in kernels) == names
    modules = {path.stem for path in Path(asag.ops.__file__).parent.glob("*.py")} - {"__init__", "cuda"}
    assert sorted(modules) == names
    ours = [str(op) for op in translation_table() if str(op).startswith(f"{DOMAIN}.")]
    assert sorted(ours) == [f"{DOMAIN}.{name}.default" for name in names]


def test_activations_have_the_names_of_the_definition() -> None:
    assert ACTIVATIONS == DEFINED


def test_attributes_are_completed_or_asked_for() -> None:
    operation = OPERATIONS["SamplingMixing"]
    assert operation.complete({"mixed_points": 8}) == {"mixed_points": 8, "activation": 0, "point_unit": 4}
    assert list(operation.complete({"point_unit": 1, "mixed_points": 8})) == [
        "mixed_points",
        "activation",
        "point_unit",
    ]
    with pytest.raises(ValueError, match="SamplingMixing needs the attributes mixed_points"):
        operation.complete({})
    lists = {"level_points": [4, 4], "level_shapes": [1, 2, 3, 4]}  # as a node of a file has them
    completed = OPERATIONS["MultiScaleDeformableAttention"].complete(lists)
    assert completed == {"level_shapes": (1, 2, 3, 4), "level_points": (4, 4)}


MAPS = [(2, 16, 24, 40), (2, 16, 12, 20), (2, 16, 6, 10), (2, 16, 3, 5)]
EXAMPLES = {
    "AdaptiveProbing": ([(2, 30, 5), (2, 30), (2, 8, 20, 24), (2, 2)], {"stride": 16, "capacity": 4}),
    "GatherAnchors": ([(2, 30, 5), (2, 30)], {"first": 10, "keep_threshold": 0.1, "fewest": 2, "most": 20}),
    "PyramidRoIAlign": ([*MAPS, (2, 5, 4)], {}),
    "SamplingMixing": ([*MAPS, (2, 5, 2, 8, 3), (2, 5, 2 * (8 * 8 + 16 * 8))], {"mixed_points": 16}),
    "MultiScaleDeformableAttention": (
        [(2, 14, 2, 4), (2, 5, 2, 5, 2), (2, 5, 2, 5)],
        {"level_shapes": (3, 4, 1, 2), "level_points": (3, 2)},
    ),
    "SelectTokens": ([(2, 30), (2,)], {"capacity": 8}),
    "SampleGrid": ([(2, 3, 4, 6), (2, 5, 2, 2)], {"padding": 1, "align_corners": 0}),
}


@by_name
def test_samples_fit_the_definition(operation: Operation) -> None:
    shapes, attributes = EXAMPLES[operation.name]
    arrays = operation.sample(np.random.default_rng(0), shapes, attributes)
    assert [array.shape for array in arrays] == shapes
    assert [str(array.dtype) for array in arrays] == operation.types("float32")
    assert all(np.isfinite(array).all() for array in arrays)
    outputs = find_definition(operation)(*map(torch.from_numpy, arrays), **attributes)
    found = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [list(output.shape) for output in found] == operation.output_shapes(shapes, attributes)


@pytest.mark.parametrize(("extent", "whole"), [(1, False), (400, True)])
def test_no_more_of_the_maps_is_read_than_there_is(extent: int, whole: bool) -> None:
    """Two boxes or two points cannot touch a whole map; four hundred of them touch it all at most."""
    maps = sum(int(np.prod(shape)) for shape in MAPS)
    aligned = OPERATIONS["PyramidRoIAlign"].work([*MAPS, (2, extent, 4)], {})
    assert aligned.map_values == (maps if whole else 2 * extent * 16 * 7 * 7 * 4 * 4)
    shapes = [*MAPS, (2, extent, 2, 8, 3), (2, extent, 1)]
    mixed = OPERATIONS["SamplingMixing"].work(shapes, {"mixed_points": 16})
    taps = 2 * extent * 16 * 8 * 4
    assert mixed.map_values == sum(min(int(np.prod(shape)), taps) for shape in MAPS)
    assert (mixed.map_values == maps) == whole
    attended = OPERATIONS["MultiScaleDeformableAttention"].work([(2, 650, 4, 16), (2, extent, 4, 8, 2)], {})
    taps = 2 * extent * 4 * 8 * 16 * 4
    assert attended.map_values == (2 * 650 * 4 * 16 if whole else taps)
    assert attended.operations == 2 * taps
