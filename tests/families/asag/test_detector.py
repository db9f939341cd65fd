"""The detector as a whole: what an image gives is its own affair, and odd images are images too."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asag.deploy import DeployedDetector
from asag.families.asag.config import DECODERS, HEADS
from asag.families.asag.detector import ASAGDetector, HeadOutput
from tests.builders import normalized_batch, random_detector, random_picture, small_config, small_info, uint8_batch
from tests.families.asag.everything import all_stages

HEIGHT, WIDTH = 160, 192

# Random numbers of the same seeds every time: a confidence that happens to lie within rounding of a threshold would
# otherwise fail a test about something else.
REPEATABLE = settings(max_examples=15, deadline=None, derandomize=True)

content = st.tuples(st.integers(1, HEIGHT), st.integers(1, WIDTH))


@pytest.fixture(scope="module", params=DECODERS)
def detector(request: pytest.FixtureRequest) -> ASAGDetector:
    return random_detector(small_config(decoder=request.param), seed=2)


@pytest.fixture(scope="module")
def tiny() -> ASAGDetector:
    return random_detector()


def run(
    detector: ASAGDetector, images: Tensor, sizes: Tensor, capacity: tuple[int, int] | None = None
) -> tuple[HeadOutput, Tensor, Tensor]:
    """Head output, which queries are valid, and the overflow."""
    model = copy.copy(detector)
    model.capacity = capacity
    with torch.no_grad():
        found = model(images, sizes)
    assert found.valid is not None
    assert found.overflow is not None
    return HeadOutput(found.logits, found.boxes), found.valid, found.overflow


def check_same(found: tuple[HeadOutput, Tensor, Tensor], expected: tuple[HeadOutput, Tensor, Tensor]) -> None:
    """The same valid queries of one image each, in the same order."""
    (output, valid, _), (reference, reference_valid, _) = found, expected
    assert int(valid.sum()) == int(reference_valid.sum())
    torch.testing.assert_close(output.logits[valid], reference.logits[reference_valid], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.boxes[valid], reference.boxes[reference_valid], rtol=1e-4, atol=1e-4)


@REPEATABLE
@given(st.lists(content, min_size=2, max_size=3), st.sampled_from([None, (3, 4)]), st.integers(0, 100))
def test_an_image_does_not_depend_on_its_neighbours(
    detector: ASAGDetector, contents: list[tuple[int, int]], capacity: tuple[int, int] | None, seed: int
) -> None:
    """Given its own padded tensor (README of the family, section 1): also where a neighbour probes more or less."""
    pictures = [random_picture(seed + index, *size) for index, size in enumerate(contents)]
    images, sizes = normalized_batch(pictures, HEIGHT, WIDTH)
    together = run(detector, images, sizes, capacity)
    for index in range(len(contents)):
        own = slice(index, index + 1)
        alone = run(detector, images[own], sizes[own], capacity)
        part = (HeadOutput(*(value[own] for value in together[0])), together[1][own], together[2][own])
        check_same(part, alone)
        assert part[2].tolist() == alone[2].tolist()


@REPEATABLE
@given(content, st.integers(0, 100))
def test_a_large_capacity_agrees_with_none(detector: ASAGDetector, size: tuple[int, int], seed: int) -> None:
    images, sizes = normalized_batch([random_picture(seed, *size)], HEIGHT, WIDTH)
    free, roomy = run(detector, images, sizes), run(detector, images, sizes, (12, 24))
    check_same(roomy, free)
    assert roomy[1].shape[1] == detector.config.budget.most
    assert free[1].all(), "without a capacity one image has no padding queries"
    assert roomy[2].tolist() == free[2].tolist() == [0]


@pytest.mark.parametrize("size", [(1, WIDTH), (HEIGHT, 1), (1, 1), (2, 3), (15, 17), (31, 33), (HEIGHT, WIDTH)])
def test_tiny_contents(detector: ASAGDetector, size: tuple[int, int]) -> None:
    output, valid, _ = run(detector, *normalized_batch([random_picture(1, *size)], HEIGHT, WIDTH))
    assert int(valid.sum()) >= detector.config.budget.fewest
    assert output.logits.isfinite().all()
    assert output.boxes.isfinite().all()


def test_input_smaller_than_a_patch(detector: ASAGDetector) -> None:
    """Maps of a few cells, down to a single one on P5."""
    for height, width in ((32, 32), (32, 96), (64, 32)):
        output, _, _ = run(detector, *normalized_batch([random_picture(2, height, width)], height, width))
        assert output.boxes.isfinite().all()


def test_without_candidates_the_first_level_serves(detector: ASAGDetector) -> None:
    """Nobody is confident: the fewest are taken and nothing is explored."""
    unsure = random_detector(detector.config, confidence_shift=-30.0)
    images, sizes = normalized_batch([random_picture(3, 100, 120), random_picture(4, 160, 90)], HEIGHT, WIDTH)
    for capacity in (None, (3, 4)):
        output, valid, overflow = run(unsure, images, sizes, capacity)
        assert valid.sum(dim=1).tolist() == [unsure.config.budget.fewest] * 2
        assert output.boxes[valid].isfinite().all()
        assert overflow.tolist() == [0, 0]
    assert {"p4_anchors", "p3_anchors"}.isdisjoint(all_stages(unsure, images, sizes))


def test_an_image_without_any_anchor_gives_nothing(tiny: ASAGDetector) -> None:
    """Damaged numbers in one image: it has no queries, and its neighbour's are untouched."""
    images, sizes = normalized_batch(
        [random_picture(5, HEIGHT, WIDTH), random_picture(6, HEIGHT, WIDTH)], HEIGHT, WIDTH
    )
    expected = run(tiny, images[1:], sizes[1:])
    images[0] = float("nan")
    output, valid, overflow = run(tiny, images, sizes)
    assert not valid[0].any()
    assert int(overflow[0]) == 0
    check_same((HeadOutput(output.logits[1:], output.boxes[1:]), valid[1:], overflow[1:]), expected)
    alone = run(tiny, images[:1], sizes[:1])
    assert alone[0].logits.shape[1] == 0
    deployed = DeployedDetector(tiny, small_info((HEIGHT, WIDTH)), input_type="float32")
    with torch.no_grad():
        _, scores, _, _ = deployed(images, sizes)
    assert not scores[0].any()
    assert scores[1].any()


def test_a_full_capacity_is_counted(tiny: ASAGDetector) -> None:
    images, sizes = normalized_batch([random_picture(7, 320, 320)], 320, 320)
    overflow = [int(run(tiny, images, sizes, capacity)[2]) for capacity in ((1, 1), (2, 4), (16, 32))]
    assert overflow[0] > 0
    assert overflow[2] == 0


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (97, 131), (1, 50)])
def test_uint8_and_float32_inputs_agree(tiny: ASAGDetector, size: tuple[int, int]) -> None:
    picture = random_picture(8, *size)
    info = small_info((HEIGHT, WIDTH))
    with torch.no_grad():
        pixels = DeployedDetector(tiny, info, input_type="uint8")(*uint8_batch([picture], HEIGHT, WIDTH))
        normalized = DeployedDetector(tiny, info, input_type="float32")(*normalized_batch([picture], HEIGHT, WIDTH))
    for one, other in zip(pixels, normalized, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_stages_names_and_shapes(detector: ASAGDetector) -> None:
    images, sizes = normalized_batch([random_picture(9, HEIGHT, WIDTH), random_picture(10, 90, 100)], HEIGHT, WIDTH)
    found = all_stages(detector, images, sizes)
    budget, classes = detector.config.budget, detector.config.classes
    queries = found["anchors"].shape[1]
    assert found["p6_anchors"].shape == (2, 1, budget.fixed_anchors, 5)
    assert found["p5_anchors"].shape == (2, 4, budget.fixed_anchors, 5)
    for level in ("p4", "p3"):
        patches = len(found[f"{level}_image_index"])
        assert patches > 0
        assert found[f"{level}_anchors"].shape == (patches, budget.probed_anchors, 5)
        assert found[f"{level}_crop_xy"].shape == (patches, 2)
        assert set(found[f"{level}_image_index"].tolist()) <= {0, 1}
    for name in ("proposal", *HEADS):
        assert found[f"{name}_logits"].shape == (2, queries, classes)
        assert found[f"{name}_boxes"].shape == (2, queries, 4)
    assert not any(value.requires_grad for value in found.values())
    assert np.isfinite(found["main_boxes"][found["valid"]].numpy()).all()


def test_forward_runs_the_deployed_head(tiny: ASAGDetector) -> None:
    images, sizes = normalized_batch([random_picture(11, HEIGHT, WIDTH)], HEIGHT, WIDTH)
    stages = all_stages(tiny, images, sizes)
    outputs = []
    for head in HEADS:
        tiny.config = dataclasses.replace(tiny.config, head=head)
        outputs.append(run(tiny, images, sizes)[0])
        torch.testing.assert_close(outputs[-1].logits, stages[f"{head}_logits"])
        torch.testing.assert_close(outputs[-1].boxes, stages[f"{head}_boxes"])
    tiny.config = dataclasses.replace(tiny.config, head="main")
    assert not torch.equal(outputs[0].logits, outputs[-1].logits)


def test_heads_send_no_gradient_into_the_proposals_boxes(tiny: ASAGDetector) -> None:
    """The decoder takes the proposal's box detached, its query with gradient."""
    images, sizes = normalized_batch([random_picture(12, 64, 64)], 64, 64)
    tiny(images, sizes).boxes.sum().backward()
    branches = tiny.proposals.branches
    assert all(parameter.grad is None for parameter in branches.parameters())
    assert tiny.proposals.roi_projection.weight.grad is not None
    tiny.zero_grad(set_to_none=True)
