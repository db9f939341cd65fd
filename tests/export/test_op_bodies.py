"""Each op's ONNX body, alone in a model and run by ONNX Runtime, against the definition in PyTorch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from asag.export.op_bodies import HELPER_FUNCTIONS, OP_FUNCTIONS
from asag.export.op_bodies.domain import DOMAIN_VERSION, OPSET_VERSION
from asag.ops import (
    adaptive_probing_definition,
    deformable_attention_definition,
    gather_anchors_definition,
    pyramid_roi_align_definition,
    sample_grid_definition,
    sampling_mixing_definition,
    select_tokens_definition,
)
from asag.trt_plugins.operations import DOMAIN
from tests.trt_plugins.kernel_cases import attention_inputs, grid_inputs, scores_with_ties

FUNCTIONS = {function.name: function.to_function_proto() for function in (*OP_FUNCTIONS, *HELPER_FUNCTIONS)}
ELEMENT_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.bool: TensorProto.BOOL,
    torch.int64: TensorProto.INT64,
}
PYRAMID = ("p2", "p3", "p4", "p5")
INPUTS = {
    "AdaptiveProbing": ("anchors", "valid", "feature", "sizes"),
    "GatherAnchors": ("anchors", "selectable"),
    "PyramidRoIAlign": (*PYRAMID, "boxes"),
    "SamplingMixing": (*PYRAMID, "points", "parameters"),
    "MultiScaleDeformableAttention": ("value", "locations", "weights"),
    "SelectTokens": ("scores", "counts"),
    "SampleGrid": ("value", "grid"),
}
DEFINITIONS = {
    "AdaptiveProbing": adaptive_probing_definition,
    "GatherAnchors": gather_anchors_definition,
    "PyramidRoIAlign": pyramid_roi_align_definition,
    "SamplingMixing": sampling_mixing_definition,
    "MultiScaleDeformableAttention": deformable_attention_definition,
    "SelectTokens": select_tokens_definition,
    "SampleGrid": sample_grid_definition,
}
# A session takes milliseconds to make, one per set of attributes.
EXAMPLES = settings(max_examples=60, deadline=None)


def one_node_model(name: str, tensors: Sequence[Tensor], attributes: dict[str, Any]) -> onnx.ModelProto:
    function = FUNCTIONS[name]
    node = helper.make_node(name, list(function.input), list(function.output), domain=DOMAIN, **attributes)
    # Every axis has a name of its own, so that one session takes all shapes.
    inputs = [
        helper.make_tensor_value_info(
            given, ELEMENT_TYPES[tensor.dtype], [f"{given}{axis}" for axis in range(tensor.ndim)]
        )
        for given, tensor in zip(function.input, tensors, strict=True)
    ]
    outputs = [onnx.ValueInfoProto(name=given) for given in function.output]
    return helper.make_model(
        helper.make_graph([node], name, inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET_VERSION), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        functions=list(FUNCTIONS.values()),
        ir_version=10,
    )


@functools.lru_cache(maxsize=200)
def session(content: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(name: str, tensors: Sequence[Tensor], **attributes: Any) -> list[np.ndarray]:
    model = one_node_model(name, tensors, attributes)
    given = dict(zip(FUNCTIONS[name].input, (tensor.numpy() for tensor in tensors), strict=True))
    return session(model.SerializeToString()).run(None, given)


def check(name: str, tensors: Sequence[Tensor], tolerance: float = 0.0, **attributes: Any) -> list[np.ndarray]:
    """Body and definition agree in shapes, types and values; gives the body's outputs."""
    expected = DEFINITIONS[name](*tensors, *attributes.values())
    expected = (expected,) if isinstance(expected, Tensor) else tuple(expected)
    found = run(name, tensors, **attributes)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        reference = other.numpy()
        assert one.dtype == reference.dtype
        assert one.shape == reference.shape
        if tolerance and reference.dtype == np.float32:
            np.testing.assert_allclose(one, reference, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(one, reference)
    return found


def confidences(generator: np.random.Generator, shape: tuple[int, ...], ties: bool) -> np.ndarray:
    choices = np.array([0.0, 0.1, 0.3, 0.5, 0.7, np.nan], np.float32)
    return generator.choice(choices, shape) if ties else generator.random(shape).astype(np.float32)


@EXAMPLES
@given(
    batch=st.integers(1, 3),
    count=st.integers(1, 20),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    stride=st.sampled_from([8, 16]),
    capacity=st.sampled_from([1, 3, 24]),
    ties=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_adaptive_probing(
    batch: int, count: int, height: int, width: int, stride: int, capacity: int, ties: bool, seed: int
) -> None:
    """Exactly equal: one-cell maps, anchors outside, NaN and equal confidences, more candidates than places."""
    generator = np.random.default_rng(seed)
    anchors = np.empty((batch, count, 5), np.float32)
    anchors[..., :2] = generator.integers(-20, max(height, width) * stride + 20, (batch, count, 2))
    anchors[..., 2:4] = generator.uniform(1, 9 * stride, (batch, count, 2))
    anchors[..., 4] = confidences(generator, (batch, count), ties)
    sizes = np.stack([generator.integers(1, extent * stride + 1, batch) for extent in (height, width)], axis=1)
    tensors = (
        torch.from_numpy(anchors),
        torch.from_numpy(generator.random((batch, count)) < 0.9),
        torch.from_numpy(generator.standard_normal((batch, 8, height, width)).astype(np.float32)),
        torch.from_numpy(sizes.astype(np.float32)),
    )
    check("AdaptiveProbing", tensors, stride=stride, capacity=capacity)


def test_adaptive_probing_without_candidates() -> None:
    anchors = torch.tensor([[[50.0, 50.0, 20.0, 20.0, 0.9], [90.0, 50.0, 20.0, 20.0, float("nan")]]])
    given = (anchors, torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 8, 20, 20), torch.full((1, 2), 160.0))
    patches, corners, valid, candidate, overflow = check("AdaptiveProbing", given, stride=8, capacity=4)
    assert not any(output.any() for output in (patches, corners, valid, candidate, overflow))


@pytest.mark.parametrize(("shift", "survivors"), [(144.0, 2), (143.0, 1)])
def test_adaptive_probing_at_the_threshold(shift: float, survivors: int) -> None:
    """Squares of 240 pixels shifted by 144 have an IoU of exactly 0.25, which is not above it."""
    anchors = torch.tensor([[[300.0, 300.0, 20.0, 20.0, 0.6], [300.0 + shift, 300.0, 20.0, 20.0, 0.5]]])
    given = (anchors, torch.ones(1, 2, dtype=torch.bool), torch.randn(1, 8, 64, 64), torch.full((1, 2), 1024.0))
    _, _, valid, _, _ = check("AdaptiveProbing", given, stride=16, capacity=4)
    assert valid.sum() == survivors


def test_adaptive_probing_with_a_full_capacity() -> None:
    """Four places far apart and room for two: the most confident stay, the others are counted."""
    anchors = torch.tensor([[[50.0 + 250 * i, 100.0, 20.0, 20.0, 0.2 + 0.1 * ((i * 3) % 4)] for i in range(4)]])
    given = (anchors, torch.ones(1, 4, dtype=torch.bool), torch.randn(1, 8, 64, 64), torch.full((1, 2), 1024.0))
    _, corners, _, _, overflow = check("AdaptiveProbing", given, stride=16, capacity=2)
    assert corners[0].tolist() == [[11, 0], [26, 0]]
    assert overflow.tolist() == [2]


@EXAMPLES
@given(
    batch=st.integers(1, 3),
    total=st.sampled_from([6, 17]),
    first=st.sampled_from([1, 4, 6]),
    fewest=st.sampled_from([1, 5]),
    most=st.sampled_from([1, 3, 6]),
    ties=st.booleans(),
    scale=st.sampled_from([0.15, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_gather_anchors(
    batch: int, total: int, first: int, fewest: int, most: int, ties: bool, scale: float, seed: int
) -> None:
    """Exactly equal: both cuts, equal confidences (the first wins), NaN, nothing selectable."""
    generator = np.random.default_rng(seed)
    anchors = generator.uniform(1, 400, (batch, total, 5)).astype(np.float32)
    anchors[..., 4] = confidences(generator, (batch, total), ties) * scale
    selectable = generator.random((batch, total)) < generator.choice([0.0, 0.7, 1.0])
    given = (torch.from_numpy(anchors), torch.from_numpy(selectable))
    check("GatherAnchors", given, first=first, keep_threshold=0.1, fewest=fewest, most=most)


def test_gather_anchors_of_the_published_size() -> None:
    """2500 anchors, so the threshold lies between many near confidences."""
    generator = torch.Generator().manual_seed(0)
    anchors = torch.rand(2, 2500, 5, generator=generator)
    selectable = torch.rand(2, 2500, generator=generator) < 0.8
    check("GatherAnchors", (anchors, selectable), first=250, keep_threshold=0.1, fewest=5, most=200)
    anchors[..., 4] *= 0.107
    check("GatherAnchors", (anchors, selectable), first=250, keep_threshold=0.1, fewest=5, most=200)


def pyramid(batch: int, channels: int, height: int, width: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed % 2**31)
    return [torch.randn(batch, channels, height // s, width // s, generator=generator) for s in (4, 8, 16, 32)]


@EXAMPLES
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    cells=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**32 - 1),
)
def test_pyramid_roi_align(batch: int, queries: int, cells: tuple[int, int], seed: int) -> None:
    """Boxes of every level, inside, across the border, wholly outside and empty; P5 down to one cell."""
    generator = np.random.default_rng(seed)
    boxes = np.empty((batch, queries, 4), np.float32)
    boxes[..., :2] = generator.uniform(-60, 32 * max(cells) + 60, (batch, queries, 2))
    boxes[..., 2:] = np.exp(generator.uniform(0, 6.8, (batch, queries, 2)))
    boxes[generator.random((batch, queries)) < 0.1] = 0
    given = (*pyramid(batch, 4, 32 * cells[0], 32 * cells[1], seed), torch.from_numpy(boxes))
    check("PyramidRoIAlign", given, tolerance=1e-4)
    check("PyramidRoIAlign", given, tolerance=1e-4, maps=3, first_stride=8)


@pytest.mark.parametrize("side", [112.0, 224.0, 448.0])
def test_pyramid_roi_align_at_the_border_of_two_levels(side: float) -> None:
    """Boxes whose level changes here; the logarithm must round to the same side in both."""
    near = [(side * factor, side / factor) for factor in (0.25, 0.5, 1.0, 1.37, 3.0)]
    near += [(side - 0.01, side - 0.01), (side + 0.01, side + 0.01)]
    boxes = torch.tensor([[(40.0, 40.0, width, height) for width, height in near]])
    check("PyramidRoIAlign", (*pyramid(1, 3, 96, 96, 0), boxes), tolerance=1e-4)
    for maps, stride in ((2, 8), (4, 2), (3, 16)):
        check("PyramidRoIAlign", (*pyramid(1, 3, 96, 96, 0), boxes), tolerance=1e-4, maps=maps, first_stride=stride)


@EXAMPLES
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 4),
    groups=st.integers(1, 4),
    count=st.integers(1, 5),
    cells=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**32 - 1),
)
def test_sampling_mixing(batch: int, queries: int, groups: int, count: int, cells: tuple[int, int], seed: int) -> None:
    """Points inside, on the border, outside and far outside of maps down to one cell."""
    channels, mixed_points = 4, 6
    generator = np.random.default_rng(seed)
    points = generator.uniform(-3, 11, (batch, queries, groups, count, 3)).astype(np.float32)
    points[generator.random(points.shape[:-1]) < 0.1, :2] = generator.choice([-1e9, 1e9, 0.0, 8.0])
    width = groups * (channels**2 + mixed_points * count)
    parameters = generator.standard_normal((batch, queries, width)).astype(np.float32)
    maps = pyramid(batch, groups * channels, 32 * cells[0], 32 * cells[1], seed)
    given = (*maps, torch.from_numpy(points), torch.from_numpy(parameters))
    check("SamplingMixing", given, tolerance=1e-3, mixed_points=mixed_points)


def test_sampling_mixing_of_the_published_size() -> None:
    """Four groups of 64 channels, 32 points mixed to 128."""
    torch.manual_seed(0)
    maps = pyramid(1, 256, 64, 96, 1)
    points = torch.rand(1, 3, 4, 32, 3) * torch.tensor((24.0, 16.0, 3.0))
    parameters = torch.randn(1, 3, 4 * (64 * 64 + 128 * 32)) * 0.1
    check("SamplingMixing", (*maps, points, parameters), tolerance=1e-4, mixed_points=128)


@EXAMPLES
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    heads=st.integers(1, 3),
    levels=st.sampled_from([((6, 8), (3,)), ((1, 1, 5, 1, 1, 7), (1, 2, 3)), ((2, 3, 4, 5), (4, 4))]),
    seed=st.integers(0, 2**32 - 1),
)
def test_deformable_attention(
    batch: int, queries: int, heads: int, levels: tuple[tuple[int, ...], tuple[int, ...]], seed: int
) -> None:
    """Places inside, on the border, outside and no numbers, on maps down to one cell."""
    given = attention_inputs(seed, batch, queries, heads, 4, *levels)
    attributes = dict(zip(("level_shapes", "level_points"), levels, strict=True))
    check("MultiScaleDeformableAttention", [torch.from_numpy(array) for array in given], 1e-5, **attributes)


@EXAMPLES
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(7, 60),
    capacity=st.sampled_from([1, 3, 7]),
    most=st.sampled_from([0, 4, 10]),
    seed=st.integers(0, 2**32 - 1),
)
def test_select_tokens(batch: int, tokens: int, capacity: int, most: int, seed: int) -> None:
    """Exactly equal: equal scores, zeros of both signs, the smallest numbers, infinities and what is no number."""
    scores = torch.from_numpy(scores_with_ties(seed, batch, tokens))
    counts = torch.from_numpy(np.random.default_rng(seed).integers(0, most, batch, endpoint=True))
    check("SelectTokens", (scores, counts), capacity=capacity)


def test_select_tokens_of_the_published_size() -> None:
    """More places than TensorRT's TopK has; nearly as many different scores as tokens."""
    scores = torch.randn(2, 22323, generator=torch.Generator().manual_seed(0))
    check("SelectTokens", (scores, torch.tensor([6697, 4000])), capacity=6697)


@pytest.mark.parametrize("name", [function.name for function in OP_FUNCTIONS])
def test_attributes_come_in_the_definitions_order(name: str) -> None:
    """The translation hands the definition's arguments on by position."""
    function = FUNCTIONS[name]
    assert tuple(function.input) == INPUTS[name]
    attributes = [*function.attribute, *(each.name for each in function.attribute_proto)]
    assert [*function.input, *attributes] == list(inspect.signature(DEFINITIONS[name]).parameters)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_bodies_keep_to_operators_that_every_target_implements(function: onnx.FunctionProto) -> None:
    def operators(nodes: Sequence[onnx.NodeProto]) -> set[str]:
        found = {node.op_type for node in nodes}
        for node in nodes:
            for attribute in node.attribute:
                found |= operators(attribute.g.node)
        return found

    refused = {"NonMaxSuppression", "NonZero", "RoiAlign", "GridSample", "Compress", "Unique", "If"}
    assert not operators(function.node) & refused
    assert function.domain == DOMAIN


@EXAMPLES
@given(
    value=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    places=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.integers(0, 1),
    aligned=st.integers(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_sample_grid(
    value: tuple[int, int, int, int], places: tuple[int, int], padding: int, aligned: int, seed: int
) -> None:
    """Maps down to one cell; places anywhere, and what is no number."""
    inputs = [torch.from_numpy(array) for array in grid_inputs(seed, value, places)]
    check("SampleGrid", inputs, tolerance=1e-5, padding=padding, align_corners=aligned)
