"""PyramidRoIAlign against torchvision, box by box."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, box_convert

from asag.ops import pyramid_roi_align, pyramid_roi_align_definition
from asag.ops.pyramid_roi_align import pyramid_level

HEIGHT, WIDTH = 64, 96


def pyramid(batch: int, channels: int, seed: int, height: int = HEIGHT, width: int = WIDTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, height // s, width // s, generator=generator) for s in (4, 8, 16, 32)]


@given(st.integers(1, 3), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_equals_torchvision_per_box(batch: int, queries: int, seed: int) -> None:
    """Boxes from 1 to 900 pixels, so of every level, some of them partly or wholly outside the map."""
    features = pyramid(batch, 3, seed % 1000)
    generator = np.random.default_rng(seed)
    centres = generator.uniform(-50, WIDTH + 50, (batch, queries, 2))
    sides = np.exp(generator.uniform(0, math.log(900), (batch, queries, 2)))
    boxes = torch.from_numpy(np.concatenate((centres, sides), axis=2).astype(np.float32))
    found = pyramid_roi_align_definition(*features, boxes)
    assert found.shape == (batch, queries, 3, 7, 7)
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=224, canonical_level=4)
    for image in range(batch):
        maps = {str(level): feature[image : image + 1] for level, feature in enumerate(features)}
        for query in range(queries):
            corners = box_convert(boxes[image, query : query + 1], "cxcywh", "xyxy")
            expected = pool(maps, [corners], [(HEIGHT, WIDTH)])[0]
            torch.testing.assert_close(found[image, query], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "height", "level"),
    [
        (111.9, 112, 0),
        (112, 112, 1),
        (56, 224, 1),
        (223.9, 224, 1),
        (224, 224, 2),
        (447.9, 448, 2),
        (448, 448, 3),
        (2000, 2000, 3),
        (1, 1, 0),
        (0, 0, 0),
        (0, 50, 0),
    ],
)
def test_level_of_a_box(width: float, height: float, level: int) -> None:
    assert int(pyramid_level(torch.tensor([0.0, 0.0, width, height]))) == level


def test_level_of_a_nan_box_is_a_level() -> None:
    assert int(pyramid_level(torch.full((4,), float("nan")))) == 0


def test_constant_map_gives_its_constant() -> None:
    """Each level has a value of its own; a box well inside sees only that of its level."""
    features = [torch.full((1, 2, 1024 // s, 1024 // s), float(s)) for s in (4, 8, 16, 32)]
    sides = (50.0, 150.0, 300.0, 500.0)
    boxes = torch.tensor([[[512.0, 512.0, side, side] for side in sides]])
    found = pyramid_roi_align_definition(*features, boxes)
    torch.testing.assert_close(found.amin(dim=(2, 3, 4)), torch.tensor([[4.0, 8.0, 16.0, 32.0]]))
    torch.testing.assert_close(found.amax(dim=(2, 3, 4)), torch.tensor([[4.0, 8.0, 16.0, 32.0]]))


def test_fewer_maps_of_a_larger_stride() -> None:
    """Three maps from stride 8 on: small boxes are of the first one; of four maps P3 to P5 give the same."""
    features = pyramid(1, 3, 5)
    boxes = torch.tensor([[[60.0, 60.0, side, side] for side in (10.0, 120.0, 300.0, 900.0)]])
    found = pyramid_roi_align(features[1:], boxes, 8)
    expected = pyramid_roi_align(features, boxes)
    assert torch.equal(found[:, 1:], expected[:, 1:])
    assert not torch.equal(found[:, 0], expected[:, 0])
    assert torch.equal(pyramid_roi_align(features[1:2], boxes, 8)[:, :2], found[:, :2])


def test_images_keep_apart() -> None:
    features = pyramid(2, 3, 1)
    boxes = torch.tensor([[[30.0, 30.0, 20.0, 20.0]]]).repeat(2, 1, 1)
    together = pyramid_roi_align_definition(*features, boxes)
    for image in range(2):
        alone = pyramid_roi_align_definition(*(f[image : image + 1] for f in features), boxes[image : image + 1])
        assert torch.equal(together[image : image + 1], alone)
    assert not torch.equal(together[0], together[1])


def test_gradients_of_the_maps() -> None:
    features = [feature.double().requires_grad_() for feature in pyramid(1, 1, 2, 32, 32)]
    boxes = torch.tensor([[[16.0, 16.0, 20.0, 12.0], [10.0, 20.0, 150.0, 150.0]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *maps: pyramid_roi_align_definition(*maps, boxes), features)


def test_the_definition_serves_where_gradients_are_needed() -> None:
    features, boxes = pyramid(1, 2, 3), torch.tensor([[[30.0, 30.0, 20.0, 20.0]]])
    without = pyramid_roi_align(features, boxes)
    features[0].requires_grad_()
    with_gradient = pyramid_roi_align(features, boxes)
    assert without.grad_fn is None
    assert torch.equal(with_gradient.detach(), without)
    with_gradient.sum().backward()
    assert features[0].grad is not None
    assert features[0].grad.abs().sum() > 0
