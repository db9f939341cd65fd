"""Multi-scale deformable attention against the golden case and against loops."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from asag.ops import deformable_attention_definition, multi_scale_deformable_attention

SHAPES = ((3, 4), (1, 2), (1, 1))
POINTS = (2, 1, 2)


def case(batch: int = 2, queries: int = 3, seed: int = 0) -> list[Tensor]:
    """value, locations and weights of two heads of three channels."""
    generator = torch.Generator().manual_seed(seed)
    locations = torch.rand(batch, queries, 2, sum(POINTS), 2, generator=generator) * 1.6 - 0.3
    weights = torch.rand(batch, queries, 2, sum(POINTS), generator=generator)
    return [torch.randn(batch, 15, 2, 3, generator=generator), locations, weights]


def attention(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return multi_scale_deformable_attention(value, locations, weights, SHAPES, POINTS)


def test_the_golden_case(goldens: Path) -> None:
    """Output and gradients of the published code."""
    golden = np.load(goldens / "sparse_detr" / "op_deformable_attention.npz")
    names = "value", "locations", "weights"
    value, locations, weights = (torch.from_numpy(golden[name]).float() for name in names)
    tensors = [value, locations.flatten(3, 4), weights.flatten(3, 4)]
    shapes = [tuple(shape) for shape in golden["spatial_shapes"].tolist()]
    with torch.no_grad():
        found = multi_scale_deformable_attention(*tensors, shapes, (4, 4, 4, 4))
    np.testing.assert_allclose(found, golden["output"], atol=1e-6)

    leaves = [tensor.requires_grad_() for tensor in tensors]
    again = multi_scale_deformable_attention(*leaves, shapes, (4, 4, 4, 4))
    assert torch.equal(again.detach(), found)
    (again * torch.from_numpy(golden["cotangent"]).float()).sum().backward()
    for name, leaf in zip(names, leaves, strict=True):
        expected = golden[f"grad_{name}"]
        np.testing.assert_allclose(leaf.grad.reshape(expected.shape), expected, atol=3e-6, err_msg=name)


def slow_sample(cells: NDArray, place: NDArray) -> NDArray:
    """One point of one head: cells [H, W, D] of a level -> [D] in double precision."""
    height, width, channels = cells.shape
    total = np.zeros(channels)
    column, row = place[0] * width - 0.5, place[1] * height - 0.5
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * cells[i, j]
    return total


@given(st.integers(1, 2), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_against_loops(batch: int, queries: int, seed: int) -> None:
    """Points inside, outside and on the border of maps down to one cell."""
    value, locations, weights = (tensor.double() for tensor in case(batch, queries, seed))
    locations.flatten()[0] = 1.0
    found = attention(value, locations, weights).unflatten(2, (2, 3)).numpy()
    places = [level for level, count in enumerate(POINTS) for _ in range(count)]
    for b, q, head in np.ndindex(batch, queries, 2):
        expected, first = np.zeros(3), 0
        for level, shape in enumerate(SHAPES):
            cells = value[b, first : first + math.prod(shape), head].reshape(*shape, 3).numpy()
            first += math.prod(shape)
            for point in (point for point, own in enumerate(places) if own == level):
                sampled = slow_sample(cells, locations[b, q, head, point].numpy())
                expected += float(weights[b, q, head, point]) * sampled
        np.testing.assert_allclose(found[b, q, head], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("far", [1.7, -0.7, 1e30, 3.4e38, math.inf, -math.inf, math.nan])
def test_places_far_outside_and_no_numbers_sample_zeros(far: float) -> None:
    value, locations, weights = case()
    locations[..., 0] = far
    assert not attention(value, locations, weights).any()


def test_images_keep_apart() -> None:
    tensors = case()
    together = attention(*tensors)
    for image in range(2):
        torch.testing.assert_close(together[image:][:1], attention(*(tensor[image:][:1] for tensor in tensors)))


def test_gradients() -> None:
    tensors = [tensor.double().requires_grad_() for tensor in case(batch=1, queries=1)]
    assert torch.autograd.gradcheck(attention, tensors)


def test_the_definition_serves_where_gradients_are_needed() -> None:
    tensors = case()
    expected = attention(*tensors)
    for tensor in tensors:
        tensor.requires_grad_()
        found = attention(*tensors)
        assert torch.equal(found.detach(), expected)
        assert found.grad_fn is not None
        with torch.no_grad():
            assert attention(*tensors).grad_fn is None
        tensor.requires_grad_(False)


def test_half_values_are_summed_in_float32() -> None:
    value, locations, weights = case()
    found = attention(value.half(), locations, weights.half())
    exact = attention(value.half().float(), locations, weights.half().float())
    assert torch.equal(found, exact.half())


@pytest.mark.parametrize(
    ("shapes", "points"),
    [
        ((3, 4, 1, 2), (2, 1, 2)),
        ((3, 4, 1, 2, 1, 2), (2, 1, 2)),
        ((3, 4, 1, 2, 1, 1), (2, 1, 1)),
        ((3, 5, 0, 2), (2, 3)),
        ((3, 4, 1, 3), (5, 0)),
    ],
)
def test_levels_that_do_not_fit_are_refused(shapes: tuple[int, ...], points: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit 15 cells and 5 points"):
        deformable_attention_definition(*case(), shapes, points)
