"""SamplingMixing against loops over points, levels and neighbours."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import erf, softmax
from torch import Tensor

from asag.ops import sampling_mixing, sampling_mixing_definition
from asag.ops.sampling_mixing import adaptive_mixing, sample_pyramid

STRIDES = (4, 8, 16, 32)


def pyramid(batch: int, channels: int, seed: int, height: int = 32, width: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, height // s, width // s, generator=generator) for s in STRIDES]


def slow_sample(features: list[NDArray], point: NDArray) -> NDArray:
    """One point of one group: features [C, H, W] of the four levels -> [C] in double precision."""
    x, y, z = (float(value) for value in point)
    weights = softmax([-((z - level) ** 2) / 2 for level in range(4)])
    total = np.zeros(features[0].shape[0])
    for feature, stride, weight in zip(features, STRIDES, weights, strict=True):
        column, row = x * 4 / stride - 0.5, y * 4 / stride - 0.5
        for i in (math.floor(row), math.floor(row) + 1):
            for j in (math.floor(column), math.floor(column) + 1):
                if 0 <= i < feature.shape[1] and 0 <= j < feature.shape[2]:
                    total += weight * (1 - abs(row - i)) * (1 - abs(column - j)) * feature[:, i, j]
    return total


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_samples_against_loops(batch: int, queries: int, groups: int, count: int, seed: int) -> None:
    """Points inside, outside and on the border of maps down to one row of cells; z also far from the levels."""
    channels = 2
    features = pyramid(batch, groups * channels, seed % 1000)
    generator = np.random.default_rng(seed)
    points = np.empty((batch, queries, groups, count, 3), np.float32)
    points[..., 0] = generator.uniform(-4, 20, points.shape[:-1])
    points[..., 1] = generator.uniform(-4, 12, points.shape[:-1])
    points[..., 2] = generator.uniform(-3, 6, points.shape[:-1])
    points[..., 0].flat[0] = 16.0  # the right edge of the maps
    found = sample_pyramid(tuple(features), torch.from_numpy(points)).numpy()
    assert found.shape == (batch, queries, groups, count, channels)
    arrays = [feature.double().numpy() for feature in features]
    for b, q, g, p in np.ndindex(batch, queries, groups, count):
        own = [array[b, g * channels : (g + 1) * channels] for array in arrays]
        np.testing.assert_allclose(found[b, q, g, p], slow_sample(own, points[b, q, g, p]), rtol=1e-4, atol=1e-4)


def gelu(x: NDArray) -> NDArray:
    return x * (1 + erf(x / math.sqrt(2))) / 2


def norm(x: NDArray) -> NDArray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5)


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_mixing_against_loops(batch: int, queries: int, groups: int, count: int, seed: int) -> None:
    channels, mixed_points = 3, 5
    generator = np.random.default_rng(seed)
    samples = generator.standard_normal((batch, queries, groups, count, channels))
    per_group = channels * channels + mixed_points * count
    parameters = generator.standard_normal((batch, queries, groups * per_group))
    found = adaptive_mixing(torch.from_numpy(samples), torch.from_numpy(parameters), mixed_points).numpy()
    for b, q in np.ndindex(batch, queries):
        parts = []
        for g in range(groups):
            own = parameters[b, q, g * per_group : (g + 1) * per_group]
            channel_matrix = own[: channels * channels].reshape(channels, channels)
            point_matrix = own[channels * channels :].reshape(mixed_points, count)
            mixed = gelu(norm(samples[b, q, g] @ channel_matrix))
            parts.append(gelu(norm(point_matrix @ mixed)).flatten())
        np.testing.assert_allclose(found[b, q], np.concatenate(parts), rtol=1e-7, atol=1e-9)


def case(batch: int = 2, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor, int]:
    """Two groups of two channels, three points mixed to five."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(batch, 4, 2, 3, 3, generator=generator) * torch.tensor((16.0, 8.0, 3.0))
    parameters = torch.randn(batch, 4, 2 * (2 * 2 + 5 * 3), generator=generator)
    return pyramid(batch, 4, seed), points, parameters, 5


def test_whole_op_is_sampling_then_mixing() -> None:
    features, points, parameters, mixed_points = case()
    found = sampling_mixing(features, points, parameters, mixed_points)
    assert found.shape == (2, 4, 2 * 5 * 2)
    assert torch.equal(found, adaptive_mixing(sample_pyramid(tuple(features), points), parameters, mixed_points))


def test_far_points_sample_zeros() -> None:
    features, points, _, _ = case()
    for far in (-1e4, 1e4):
        assert not sample_pyramid(tuple(features), points + torch.tensor((far, far, 0.0))).any()


def test_images_keep_apart() -> None:
    features, points, parameters, mixed_points = case()
    together = sampling_mixing(features, points, parameters, mixed_points)
    for image in range(2):
        own = slice(image, image + 1)
        alone = sampling_mixing([f[own] for f in features], points[own], parameters[own], mixed_points)
        torch.testing.assert_close(together[own], alone)


def test_gradients() -> None:
    features, points, parameters, mixed_points = case(batch=1)
    tensors = [tensor[:1].double().requires_grad_() for tensor in (*features, points[:, :1], parameters[:, :1])]
    assert torch.autograd.gradcheck(lambda *inputs: sampling_mixing_definition(*inputs, mixed_points), tensors)


def test_the_definition_serves_where_gradients_are_needed() -> None:
    features, points, parameters, mixed_points = case()
    expected = sampling_mixing(features, points, parameters, mixed_points)
    assert expected.grad_fn is None
    for tensor in (features[0], points, parameters):
        tensor.requires_grad_()
        found = sampling_mixing(features, points, parameters, mixed_points)
        assert torch.equal(found.detach(), expected)
        found.sum().backward()
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0
        tensor.requires_grad_(False)
