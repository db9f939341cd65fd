"""The anchor generator's parts against plain formulas, and the generator as a whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from asag.families.asag.anchors import (
    AnchorGenerator,
    fixed_anchors_to_pixels,
    probed_anchors_to_pixels,
    resize_content,
    split_quarters,
)
from asag.families.asag.config import ANCHOR_BUDGETS
from asag.families.asag.pyramid import Pyramid
from tests.builders import normalized_batch, random_detector, random_picture, small_config


@given(
    st.lists(st.tuples(st.floats(1, 12, width=32), st.floats(1, 9, width=32)), min_size=1, max_size=3),
    st.sampled_from([6, 30]),
    st.integers(0, 1000),
)
@example([(2.5, 3.5), (4.5, 5.5)], 30, 0)  # half goes to even: 2 and 4, 4 and 6
@example([(0.25, 0.5)], 30, 0)  # a content of less than half a cell is still one cell
@example([(12.0, 9.0), (1.0, 1.0)], 30, 0)
def test_resize_content_is_interpolation_of_the_crop(contents: list[tuple[float, float]], side: int, seed: int) -> None:
    feature = torch.randn((len(contents), 2, 12, 9), generator=torch.Generator().manual_seed(seed))
    found = resize_content(feature, torch.tensor(contents), side)
    for image, (height, width) in enumerate(contents):
        crop = feature[image : image + 1, :, : max(1, round(height)), : max(1, round(width))]
        expected = F.interpolate(crop, size=(side, side), mode="bilinear", align_corners=False, antialias=False)
        torch.testing.assert_close(found[image : image + 1], expected, rtol=1e-5, atol=1e-5)


def test_resize_content_does_not_see_past_the_content() -> None:
    feature = torch.randn(1, 2, 12, 9)
    cells = torch.tensor([[5.0, 4.0]])
    expected = resize_content(feature, cells, 30)
    feature[:, :, 5:] = 1e6
    feature[:, :, :, 4:] = -1e6
    torch.testing.assert_close(resize_content(feature, cells, 30), expected)


def test_split_quarters() -> None:
    feature = torch.arange(2 * 3 * 30 * 30, dtype=torch.float32).reshape(2, 3, 30, 30)
    found = split_quarters(feature)
    assert found.shape == (2, 4, 225, 3)
    for quarter, (top, left) in enumerate([(0, 0), (0, 15), (15, 0), (15, 15)]):
        for token in (0, 1, 14, 15, 224):
            cell = feature[:, :, top + token // 15, left + token % 15]
            assert torch.equal(found[:, quarter, token], cell)


def logit(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


def test_fixed_anchors_to_pixels() -> None:
    """Every quarter's box in the middle of its quarter, one of P6 in the middle of the content."""
    sizes = torch.tensor([[120.0, 200.0]])
    p5 = torch.tensor([0.5, 0.5, 0.2, 0.4, logit(0.3)]).repeat(1, 4, 2, 1)
    p6 = torch.tensor([0.5, 0.25, 1.0, 0.5, logit(0.6)]).repeat(1, 1, 2, 1)
    found = fixed_anchors_to_pixels(p5, p6, sizes)
    centres = [(50.0, 30.0), (150.0, 30.0), (50.0, 90.0), (150.0, 90.0)]
    expected = [[x, y, 20.0, 24.0, 0.3] for x, y in centres for _ in range(2)]
    expected += [[100.0, 30.0, 200.0, 60.0, 0.6]] * 2
    torch.testing.assert_close(found, torch.tensor([expected]))


@pytest.mark.parametrize(("width", "height", "counts"), [(3.0, 3.0, True), (2.9, 50.0, False), (50.0, 2.9, False)])
def test_anchors_under_three_pixels_count_nothing(width: float, height: float, counts: bool) -> None:
    sizes = torch.tensor([[100.0, 100.0]])
    p5 = torch.tensor([0.5, 0.5, width / 50, height / 50, logit(0.5)]).repeat(1, 4, 1, 1)
    p6 = torch.tensor([0.5, 0.5, width / 100, height / 100, logit(0.5)]).repeat(1, 1, 1, 1)
    confidence = fixed_anchors_to_pixels(p5, p6, sizes)[..., 4]
    torch.testing.assert_close(confidence, torch.full((1, 5), 0.5 if counts else 0.0))


@given(st.sampled_from([8, 16]), st.integers(0, 1000))
def test_probed_anchors_to_pixels(stride: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    predictions = generator.random((2, 3, 4, 5)).astype(np.float32)
    corners = generator.integers(0, 12, (2, 3, 2))
    sizes = generator.integers(60, 240, (2, 2)).astype(np.float32)
    found = probed_anchors_to_pixels(
        torch.from_numpy(predictions), torch.from_numpy(corners), stride, torch.from_numpy(sizes)[:, None, None]
    ).numpy()
    for place in np.ndindex(2, 3, 4):
        x, y, width, height = predictions[place][:4] * 15 * stride
        x += corners[place[:2]][0] * stride
        y += corners[place[:2]][1] * stride
        counts = x < sizes[place[0]][1] and y < sizes[place[0]][0] and width >= 3 and height >= 3
        confidence = 1 / (1 + np.exp(-predictions[place][4])) if counts else 0.0
        np.testing.assert_allclose(found[place], [x, y, width, height, confidence], rtol=1e-5)


@pytest.mark.parametrize(("x", "counts"), [(0.5, False), (0.49999, True)])
def test_centre_on_the_content_edge_counts_nothing(x: float, counts: bool) -> None:
    predictions = torch.tensor([[[x, 0.1, 0.5, 0.5, logit(0.5)]]])
    found = probed_anchors_to_pixels(predictions, torch.tensor([[0, 0]]), 8, torch.tensor([[[100.0, 60.0]]]))
    assert float(found[0, 0, 4]) == (0.5 if counts else 0.0)


def pyramid(
    generator: AnchorGenerator, sizes: list[tuple[int, int]], height: int, width: int
) -> tuple[Pyramid, Tensor]:
    torch.manual_seed(5)
    channels = generator.config.size.channels
    features = [torch.randn(len(sizes), channels, height // stride, width // stride) for stride in (4, 8, 16, 32)]
    return Pyramid(features, 2), torch.tensor(sizes, dtype=torch.float32)


@torch.no_grad()
def test_p6_patch_is_the_dilated_convolution_of_the_resized_content() -> None:
    generator = random_detector().anchor_generator
    features, sizes = pyramid(generator, [(192, 160), (90, 130)], 192, 160)
    _, p6 = generator.fixed_maps(features, sizes)
    for image, (height, width) in enumerate(sizes.tolist()):
        content = generator.compressed("P5", features)[image : image + 1, :, : round(height / 32), : round(width / 32)]
        resized = F.interpolate(content, size=(30, 30), mode="bilinear")
        expected = F.conv2d(resized.relu(), generator.p6.weight, generator.p6.bias, stride=2, padding=2, dilation=2)
        assert expected.shape == (1, 8, 15, 15)
        torch.testing.assert_close(p6[image : image + 1], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_prediction_of_a_patch_by_the_formula() -> None:
    """LayerNorm over the joint (225, 8), position embedding, the MLP on token-major numbers, sigmoid of the boxes."""
    generator = random_detector().anchor_generator
    patch = torch.randn(225, 8)
    for level, mlp in (("P5", generator.fixed_mlp), ("P4", generator.probed_mlp), ("P3", generator.probed_mlp)):
        norm = generator.norm[level]
        tokens = (patch - patch.mean()) / torch.sqrt(patch.var(unbiased=False) + 1e-5)
        tokens = tokens * norm.weight + norm.bias + generator.position[level]
        x = tokens.flatten()
        for index in (0, 2, 4):
            x = mlp[index].weight @ (F.gelu(x) if index else x) + mlp[index].bias
        expected = x.reshape(-1, 5)
        expected[:, :4] = expected[:, :4].sigmoid()
        torch.testing.assert_close(generator.predict(patch[None, None], level)[0, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("levels", "explored"), [("P3P6", ["P4", "P3"]), ("P4P6", ["P4"]), ("P5P6", [])])
@pytest.mark.parametrize("capacity", [None, (9, 9)])
@torch.no_grad()
def test_levels_stop_where_they_should(levels: str, explored: list[str], capacity: tuple[int, int] | None) -> None:
    generator = random_detector(small_config(levels=levels)).anchor_generator
    found = generator(*pyramid(generator, [(192, 224), (150, 100)], 192, 224), capacity)
    assert list(found.probed) == explored
    assert found.valid.any(dim=1).all()
    assert (found.boxes[~found.valid] == 0).all()


@torch.no_grad()
def test_candidates_of_an_explored_level_are_no_queries() -> None:
    """With a level to explore, what asked for a closer look is left out.

    Without one, it stays (README of the family, section 3).
    """
    config = small_config(levels="P4P6")
    detector = random_detector(config, confidence_shift=1.5)
    features, sizes = pyramid(detector.anchor_generator, [(256, 288)], 256, 288)
    deeper = detector.anchor_generator(features, sizes)
    fixed = deeper.fixed.anchors[0]
    asks = (fixed[:, 4] > 0.1) & (fixed[:, 4] < 0.7) & (fixed[:, 2:4] < 120).all(dim=1)
    kept = fixed[:, 4] > config.budget.keep_threshold
    assert asks.sum() >= 5, "the case must have candidates"
    assert (kept & ~asks).sum() >= config.budget.fewest, "and must not run into the rule of the fewest"
    queries = {tuple(box) for box in deeper.boxes[0][deeper.valid[0]].tolist()}
    assert not queries & {tuple(box) for box in fixed[asks][:, :4].tolist()}
    detector.anchor_generator.config = dataclasses.replace(config, levels="P5P6")
    alone = detector.anchor_generator(features, sizes)
    assert torch.equal(alone.boxes[0][alone.valid[0]], fixed[kept][:, :4])


@torch.no_grad()
def test_no_candidate_means_no_further_level() -> None:
    sure = random_detector(confidence_shift=30.0).anchor_generator
    found = sure(*pyramid(sure, [(128, 128), (100, 70)], 128, 128))
    assert found.probed == {}
    assert found.overflow.tolist() == [0, 0]


@torch.no_grad()
def test_patch_limit_of_the_variant_is_no_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """CrowdHuman explores at most so many patches of a level; a smaller capacity is a loss and counted."""
    detector = random_detector(small_config(dataset="crowdhuman", queries=300, num_classes=1))
    generator = detector.anchor_generator
    features, sizes = pyramid(generator, [(512, 512)], 512, 512)
    unlimited = generator(features, sizes)
    assert unlimited.probed["P4"].valid.sum() > 3, "the case must have more patches than the limit"
    budget = dataclasses.replace(generator.config.budget, patch_limit=3)
    monkeypatch.setitem(ANCHOR_BUDGETS, ("crowdhuman", 300), budget)
    for capacity in (None, (3, 3), (8, 8)):
        found = generator(features, sizes, capacity)
        assert found.probed["P4"].valid.sum() == 3
        assert found.overflow.tolist() == [0]
    assert int(generator(features, sizes, (2, 2)).overflow) > 0


@torch.no_grad()
def test_a_picture_probes_both_levels() -> None:
    """The random detector of these tests explores, so that what is tested about it means something."""
    detector = random_detector()
    images, sizes = normalized_batch([random_picture(0, 192, 224)], 192, 224)
    found = detector.anchor_generator(Pyramid(detector.features(images), 2), sizes)
    assert [int(level.valid.sum()) > 0 for level in found.probed.values()] == [True, True]
