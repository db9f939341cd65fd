import math

import pytest
import torch
from asag.config import PATCH_SIDE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from train.probing import (
    four_flips,
    ground_truth_corners,
    last_corner,
    random_corners,
    top_up_corners,
    training_patches,
)


def scattered_boxes(count: int, content: tuple[int, int], generator: torch.Generator) -> Tensor:
    limit = torch.tensor([content[1], content[0]], dtype=torch.float32)
    size = torch.rand(count, 2, generator=generator) * 150 + 4
    size = torch.minimum(size, limit)
    start = torch.rand(count, 2, generator=generator) * (limit - size)
    return torch.cat([start, start + size], 1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 12), st.tuples(st.integers(40, 500), st.integers(40, 500)), st.sampled_from([8, 16]), st.integers(0)
)
def test_ground_truth_patches_hold_an_object_and_stay_inside(
    count: int, content: tuple[int, int], stride: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    boxes = scattered_boxes(count, content, generator)
    corners = ground_truth_corners(boxes, content, stride, generator)
    small = boxes[((boxes[:, 2:] - boxes[:, :2]) < PATCH_SIDE * stride / 2).all(1)]
    assert corners.dtype == torch.int64
    assert corners.shape[1] == 2
    assert (len(corners) > 0) == (len(small) > 0)
    assert len(corners) <= len(small)
    assert (corners >= 0).all()
    assert (corners <= last_corner(content, stride)).all()
    start = corners[:, None] * stride
    held = (small[:, :2] >= start).all(-1) & (small[:, 2:] <= start + PATCH_SIDE * stride + 1e-3).all(-1)
    assert held.any(1).all()


def test_of_overlapping_objects_the_one_nearest_to_all_others_stays() -> None:
    boxes = torch.tensor([[100.0, 100, 140, 140], [110, 100, 150, 140], [300, 100, 340, 140]])
    corners = ground_truth_corners(boxes, (1000, 1000), 8, torch.Generator().manual_seed(0))
    assert len(corners) == 2
    # The middle object (nearest to both others) wins over the first: its patch comes first and reaches 150.
    assert corners[0, 0] * 8 + 120 >= 150
    assert corners[0, 0] * 8 <= 110


def test_objects_of_half_a_patch_are_too_large() -> None:
    content = (400, 400)
    assert len(ground_truth_corners(torch.tensor([[0.0, 0, 60, 20]]), content, 8)) == 0
    assert len(ground_truth_corners(torch.tensor([[0.0, 0, 59.9, 20]]), content, 8)) == 1


def test_the_shift_uses_all_of_the_free_room() -> None:
    box = torch.tensor([[160.0, 200.0, 192.0, 216.0]])
    generator = torch.Generator().manual_seed(1)
    corners = torch.cat([ground_truth_corners(box, (800, 800), 8, generator) for _ in range(400)])
    # Four cells wide and two high: eleven and thirteen cells of free room, from the object's own cell (20, 25).
    assert set(corners[:, 0].tolist()) == set(range(9, 21))
    assert set(corners[:, 1].tolist()) == set(range(12, 26))


@given(st.integers(0, 6), st.integers(0, 5), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_topping_up_brings_an_image_to_four(predicted: int, objects: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    content = (300, 420)
    boxes = scattered_boxes(objects, content, generator)
    corners = top_up_corners(predicted, boxes, content, 8, generator)
    assert len(corners) == max(4 - predicted, 0)
    assert (corners >= 0).all()
    assert (corners <= last_corner(content, 8)).all()


def test_random_patches_cover_the_content_and_a_small_content_has_one_place() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = random_corners(500, (17 * 16 - 3, 16 * 16), 16, generator)
    assert set(map(tuple, corners.tolist())) == {(x, y) for x in range(2) for y in range(3)}
    assert random_corners(3, (50, 90), 16, generator).tolist() == [[0, 0]] * 3


def training_case() -> tuple[list[Tensor], Tensor]:
    boxes = [torch.tensor([[0.3, 0.3, 0.05, 0.05], [0.7, 0.6, 0.06, 0.04]]), torch.empty(0, 4)]
    return boxes, torch.tensor([[480.0, 640.0], [416.0, 576.0]])


def test_first_epoch_explores_ground_truth_alone() -> None:
    boxes, sizes = training_case()
    predicted, index = torch.tensor([[1, 1], [2, 2]]), torch.tensor([0, 1])
    patches = training_patches(predicted, index, boxes, sizes, 8, 0, torch.Generator().manual_seed(0))
    assert patches.image_index.tolist() == [0, 0]
    assert patches.explored.tolist() == [True, True]
    centres = boxes[0][:, :2] * torch.tensor([640, 480]) / 8
    inside = (centres[:, None] >= patches.corners) & (centres[:, None] <= patches.corners + PATCH_SIDE)
    assert inside.all(-1).any(0).all()
    assert inside.all(-1).any(1).all()
    limited = training_patches(predicted, index, boxes, sizes, 8, 0, torch.Generator().manual_seed(0), most=1)
    assert torch.equal(limited.corners, patches.corners[:1])


def test_later_epochs_explore_predictions_and_add_for_the_loss_only() -> None:
    boxes, sizes = training_case()
    predicted = torch.tensor([[9, 9], [3, 4], [1, 1], [2, 2], [5, 6], [7, 8]])
    index = torch.tensor([0, 1, 1, 1, 1, 1])
    patches = training_patches(predicted, index, boxes, sizes, 8, 3, torch.Generator().manual_seed(0))
    assert patches.image_index.tolist() == [0] * 4 + [1] * 5
    assert patches.explored.tolist() == [True] + [False] * 3 + [True] * 5
    assert torch.equal(patches.corners[patches.explored], predicted)


def test_the_same_seed_gives_the_same_patches() -> None:
    boxes, sizes = training_case()
    nothing = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    runs = [training_patches(*nothing, boxes, sizes, 16, 1, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(runs[0].corners, runs[1].corners)
    assert len(runs[0].corners) == 8


@pytest.mark.parametrize("stride", [8, 16])
def test_last_corner_ends_with_the_content(stride: int) -> None:
    x, y = last_corner((333.0, 512.0), stride).tolist()
    assert (x + PATCH_SIDE, y + PATCH_SIDE) == (math.ceil(512 / stride), math.ceil(333 / stride))


def test_four_flips_are_identity_horizontal_vertical_both() -> None:
    patches = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    views = four_flips(patches)
    assert views.shape == (2, 4, 3, 4, 5)
    assert torch.equal(views[:, 0], patches)
    assert torch.equal(views[:, 1, :, :, 0], patches[..., -1])
    assert torch.equal(views[:, 2, :, 0], patches[:, :, -1])
    assert torch.equal(views[:, 3], views[:, 1].flip(-2))
