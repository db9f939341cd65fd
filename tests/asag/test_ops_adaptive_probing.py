"""AdaptiveProbing against plain loops, and its suppression against torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms

from asag.ops import adaptive_probing_definition, crop_patches, probe_candidates
from asag.ops.adaptive_probing import suppress_squares


def slow_suppression(centres: NDArray, priority: NDArray, side: int, capacity: int | None) -> tuple[list[int], int]:
    """Chosen squares of one image in order, and how many are left; integer centres make every IoU exact."""
    left = [index for index in range(len(priority)) if priority[index] > 0]
    chosen: list[int] = []
    while left and (capacity is None or len(chosen) < capacity):
        best = max(left, key=lambda index: (priority[index], -index))
        chosen.append(best)
        survivors = []
        for index in left:
            width, height = (max(0, side - abs(int(d))) for d in centres[index] - centres[best])
            shared = width * height
            if index != best and 4 * shared <= 2 * side * side - shared:  # IoU <= 1/4
                survivors.append(index)
        left = survivors
    return chosen, len(left)


def slow_probing(
    anchors: NDArray, valid: NDArray, feature: NDArray, size: NDArray, stride: int, capacity: int | None
) -> tuple[list[tuple[int, int]], list[NDArray], list[bool], int]:
    """One image: corners, patches [225, C], the candidates, the overflow."""
    limit = 15 * stride / 2
    candidate = [
        bool(valid[i] and a[2] < limit and a[3] < limit and np.float32(0.1) < a[4] < np.float32(0.7))
        for i, a in enumerate(anchors)
    ]
    priority = np.where(candidate, anchors[:, 4], -1.0)
    chosen, overflow = slow_suppression(anchors[:, :2], priority, 15 * stride, capacity)
    corners, patches = [], []
    for index in chosen:
        corner = []
        for axis, extent in ((0, size[1]), (1, size[0])):
            start = int(np.floor(anchors[index, axis] / stride - 7.5))
            corner.append(max(0, min(start, int(np.ceil(extent / stride)) - 15)))
        patch = np.zeros((225, feature.shape[0]), np.float32)
        for row in range(15):
            for column in range(15):
                y, x = corner[1] + row, corner[0] + column
                if y < feature.shape[1] and x < feature.shape[2]:
                    patch[row * 15 + column] = feature[:, y, x]
        corners.append((corner[0], corner[1]))
        patches.append(patch)
    return corners, patches, candidate, overflow


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Anchors (with ties, NaN and inadmissible ones), valid, map, sizes and stride, drawn by a seed."""
    stride = draw(st.sampled_from([8, 16]))
    batch, count = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    height, width = draw(st.integers(1, 34)), draw(st.integers(1, 34))
    few_values = draw(st.booleans())
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = np.stack([generator.integers(1, extent * stride + 1, batch) for extent in (height, width)], axis=1)
    anchors = np.empty((batch, count, 5), np.float32)
    anchors[..., :2] = generator.integers(-20, max(height, width) * stride + 20, (batch, count, 2))
    anchors[..., 2:4] = generator.uniform(1, 9 * stride, (batch, count, 2))
    choices = np.array([0.1, 0.25, 0.5, 0.7, np.nan, 0.0, 0.3], np.float32)
    drawn = generator.choice(choices, (batch, count)) if few_values else generator.random((batch, count))
    anchors[..., 4] = drawn
    valid = generator.random((batch, count)) < 0.9
    feature = generator.standard_normal((batch, 3, height, width)).astype(np.float32)
    arrays = (anchors, valid, feature, sizes.astype(np.float32))
    return *(torch.from_numpy(array) for array in arrays), stride  # type: ignore[return-value]


@given(cases(), st.none() | st.integers(1, 6))
def test_against_plain_loops(case: tuple[Tensor, Tensor, Tensor, Tensor, int], capacity: int | None) -> None:
    *tensors, stride = case
    found = adaptive_probing_definition(*tensors, stride, capacity)
    assert capacity is None or found.valid.shape[1] == capacity
    most = 0
    for image, arrays in enumerate(zip(*(tensor.numpy() for tensor in tensors), strict=True)):
        corners, patches, candidate, overflow = slow_probing(*arrays, stride, capacity)
        count = len(corners)
        most = max(most, count)
        assert found.valid[image].tolist() == [True] * count + [False] * (found.valid.shape[1] - count)
        assert [tuple(corner) for corner in found.corners[image, :count].tolist()] == corners
        for patch, expected in zip(found.patches[image], patches, strict=False):
            np.testing.assert_array_equal(patch.numpy(), expected)
        assert not found.patches[image, count:].any()
        assert not found.corners[image, count:].any()
        assert found.candidate[image].tolist() == candidate
        assert int(found.overflow[image]) == overflow
    assert capacity is not None or found.valid.shape[1] == most


@given(st.integers(1, 40), st.sampled_from([120, 240]), st.integers(0, 2**32 - 1))
def test_suppression_equals_torchvision(count: int, side: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    centres = torch.from_numpy(generator.integers(0, 600, (count, 2)).astype(np.float32))
    confidence = torch.from_numpy(generator.permutation(count).astype(np.float32) + 1) / 100
    index, taken, left = suppress_squares(centres[None], confidence[None], float(side), None)
    boxes = torch.cat((centres - side / 2, centres + side / 2), dim=1)
    assert taken.all()
    assert index[0].tolist() == nms(boxes, confidence, 0.25).tolist()
    assert left.tolist() == [0]


def anchors_at(*rows: tuple[float, float, float]) -> Tensor:
    """(x, y, confidence) -> anchors [1, A, 5] of 20 x 20 pixels."""
    return torch.tensor([[(x, y, 20.0, 20.0, confidence) for x, y, confidence in rows]])


def probe(anchors: Tensor, capacity: int | None = None, stride: int = 16) -> list[list[int]]:
    """Corners of the patches on a map of 64 x 64 cells."""
    valid = torch.ones(anchors.shape[:2], dtype=torch.bool)
    found = adaptive_probing_definition(
        anchors, valid, torch.zeros(1, 8, 64, 64), torch.full((1, 2), 64.0 * stride), stride, capacity
    )
    return found.corners[0][found.valid[0]].tolist()


def test_iou_of_exactly_a_quarter_survives() -> None:
    """Squares of 240 pixels shifted by 144 share 40 percent: IoU 0.4 / 1.6."""
    assert len(probe(anchors_at((300, 300, 0.6), (444, 300, 0.5)))) == 2
    assert len(probe(anchors_at((300, 300, 0.6), (443, 300, 0.5)))) == 1


def test_among_equals_the_first_wins() -> None:
    assert probe(anchors_at((480, 480, 0.5), (496, 480, 0.5), (464, 480, 0.5))) == [[22, 22]]
    assert probe(anchors_at((496, 480, 0.5), (480, 480, 0.5), (464, 480, 0.5))) == [[23, 22]]


def test_suppressed_squares_suppress_nothing() -> None:
    """The middle one falls to the first, so the last one, which only the middle one covers, stays."""
    assert len(probe(anchors_at((300, 300, 0.6), (400, 300, 0.5), (500, 300, 0.4)))) == 2


@pytest.mark.parametrize(
    ("confidence", "asks"),
    [(0.1, False), (0.1001, True), (0.6999, True), (0.7, False), (0.0, False), (float("nan"), False)],
)
def test_candidates_by_confidence(confidence: float, asks: bool) -> None:
    anchors = anchors_at((100, 100, confidence))
    assert probe_candidates(anchors, torch.ones(1, 1, dtype=torch.bool), 16).tolist() == [[asks]]
    assert (len(probe(anchors)) == 1) is asks


@pytest.mark.parametrize(("width", "height", "asks"), [(119.9, 119.9, True), (120, 10, False), (10, 120, False)])
def test_candidates_by_size(width: float, height: float, asks: bool) -> None:
    anchors = torch.tensor([[[100, 100, width, height, 0.5]]])
    assert probe_candidates(anchors, torch.ones(1, 1, dtype=torch.bool), 16).tolist() == [[asks]]
    assert probe_candidates(anchors, torch.zeros(1, 1, dtype=torch.bool), 16).tolist() == [[False]]


def test_a_full_capacity_keeps_the_most_confident_and_counts_the_rest() -> None:
    far_apart = [(50.0 + 250 * index, 100.0, 0.2 + 0.1 * ((index * 3) % 4)) for index in range(4)]  # .2 .5 .4 .3
    covered = (310.0, 100.0, 0.15)  # by the best one, so it is explored and no loss
    anchors = anchors_at(*far_apart, covered)
    valid = torch.ones(1, 5, dtype=torch.bool)
    found = adaptive_probing_definition(anchors, valid, torch.zeros(1, 8, 64, 64), torch.full((1, 2), 1024.0), 16, 2)
    assert found.corners[0].tolist() == [[11, 0], [26, 0]]
    assert found.overflow.tolist() == [2]
    assert found.overflow.dtype == torch.int32


def test_patches_past_the_end_of_the_map_are_zeros() -> None:
    feature = torch.arange(1, 1 + 20 * 18, dtype=torch.float32).reshape(1, 1, 20, 18)
    corners = torch.tensor([[10, 12], [0, 0]])
    patches = crop_patches(feature, torch.tensor([0, 0]), corners).reshape(2, 15, 15)
    expected = torch.zeros(15, 15)
    expected[:8, :8] = feature[0, 0, 12:, 10:]
    assert torch.equal(patches[0], expected)
    assert torch.equal(patches[1], feature[0, 0, :15, :15])


def test_the_crop_takes_the_right_image() -> None:
    feature = torch.stack((torch.zeros(2, 16, 16), torch.ones(2, 16, 16)))
    patches = crop_patches(feature, torch.tensor([1, 0]), torch.tensor([[0, 0], [1, 1]]))
    assert patches.mean(dim=(1, 2)).tolist() == [1.0, 0.0]


def test_gradient_reaches_only_the_cropped_cells() -> None:
    feature = torch.randn(1, 2, 20, 20, requires_grad=True)
    anchors = anchors_at((160, 160, 0.5))
    valid = torch.ones(1, 1, dtype=torch.bool)
    found = adaptive_probing_definition(anchors, valid, feature, torch.full((1, 2), 320.0), 16, 3)
    found.patches.sum().backward()
    expected = torch.zeros(1, 2, 20, 20)
    expected[:, :, 2:17, 2:17] = 1
    assert feature.grad is not None
    assert torch.equal(feature.grad, expected)
