"""What holds for any AdaMixer: sizes, boxes, batches, stages, configuration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asag.detector import recorded
from asag.families.adamixer import ADAMIXER
from asag.families.adamixer.config import AdaMixerConfig
from asag.families.adamixer.decoder import DecoderStage
from asag.families.adamixer.geometry import decode_xyzr, encode_xyzr
from asag.families.adamixer.presets import PRESETS
from tests.builders import normalized_batch, random_picture
from tests.families.adamixer.small_detector import random_detector, small_config

side = st.floats(0.5, 2000, width=32)
box = st.tuples(st.floats(-2000, 2000, width=32), st.floats(-2000, 2000, width=32), side, side)


@given(box)
def test_xyzr_formula_and_round_trip(values: tuple[float, float, float, float]) -> None:
    x, y, width, height = values
    found = encode_xyzr(torch.tensor(values))
    expected = torch.tensor((x, y, math.log2(math.sqrt(width * height)), math.log2(height / width)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode_xyzr(found), torch.tensor(values), rtol=1e-4, atol=1e-4)


def test_known_xyzr() -> None:
    """64 x 16 pixels: scale 2^5, and the whole logarithm of 16/64."""
    assert encode_xyzr(torch.tensor((40.0, 20.0, 64.0, 16.0))).tolist() == [40.0, 20.0, 5.0, -2.0]
    assert decode_xyzr(torch.tensor((40.0, 20.0, 5.0, -2.0))).tolist() == [40.0, 20.0, 64.0, 16.0]


def batch() -> tuple[Tensor, Tensor]:
    return normalized_batch([random_picture(1, 90, 150), random_picture(2, 128, 70)], 128, 160)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"queries": 5, "stages": 1}, {"queries": 31, "stages": 4}])
def test_numbers_of_queries_and_stages(changes: dict[str, int]) -> None:
    config = small_config(**changes)
    with recorded() as values:
        found = random_detector(config)(*batch())
    assert found.logits.shape == (2, config.queries, 3)
    assert found.boxes.shape == (2, config.queries, 4)
    assert set(values) >= {name for stage in ADAMIXER.stages(config) for name in stage.value_names()}
    assert config.max_detections == config.queries


@torch.no_grad()
def test_a_batch_gives_what_its_images_give_alone() -> None:
    """Padded to the same size: the neck's norm counts the padding."""
    detector = random_detector()
    images, sizes = batch()
    together = detector(images, sizes)
    for image in range(2):
        alone = detector(images[image : image + 1], sizes[image : image + 1])
        torch.testing.assert_close(together.logits[image : image + 1], alone.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.boxes[image : image + 1], alone.boxes, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_queries_begin_as_shares_of_each_content() -> None:
    detector = random_detector()
    _, sizes = batch()
    queries, xyzr = detector.start(sizes)
    assert torch.equal(queries[0], queries[1])
    torch.testing.assert_close(queries.mean(-1), torch.zeros(2, 12), rtol=0, atol=1e-5)
    scale = torch.tensor([[150.0, 90.0, 150.0, 90.0], [70.0, 128.0, 70.0, 128.0]]).unsqueeze(1)
    torch.testing.assert_close(decode_xyzr(xyzr), detector.initial_boxes * scale, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_an_untrained_detector_keeps_the_whole_image_and_doubts_every_class() -> None:
    detector = ADAMIXER.build(small_config()).eval()
    found = detector(*batch())
    torch.testing.assert_close(found.boxes, torch.tensor((0.5, 0.5, 1.0, 1.0)).expand(2, 12, 4), rtol=1e-4, atol=1e-4)
    assert 0.001 < float(found.logits.sigmoid().mean()) < 0.05


@torch.no_grad()
def test_the_deployed_copy_says_the_same_with_one_class_branch() -> None:
    detector = random_detector()
    deployed = detector.deployed()
    for ours, theirs in zip(detector(*batch())[:2], deployed(*batch())[:2], strict=True):
        assert torch.equal(ours, theirs)
    assert [hasattr(layer.branches, "class_logits") for layer in deployed.decoder] == [False, False, True]
    assert all(hasattr(layer.branches, "class_logits") for layer in detector.decoder)
    assert isinstance(detector.decoder[0], DecoderStage)


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="backbone is 'vgg'; choose one of resnet10"):
        AdaMixerConfig("vgg")
    for name in ("queries", "stages", "num_classes"):
        with pytest.raises(ValueError, match=f"{name} is 0; a detector needs at least one"):
            AdaMixerConfig(**{name: 0})  # type: ignore[arg-type]


def test_presets_are_what_was_published() -> None:
    found = {
        name: (preset.config.stages, preset.config.queries, preset.recipe["epochs"], preset.published.ap)
        for name, preset in PRESETS.items()
        if preset.published
    }
    assert found == {
        "adamixer-r50-1x-100": (6, 100, 12, 42.7),
        "adamixer-r50-3x-300": (6, 300, 36, 47.0),
        "adamixer-r101-3x-300": (6, 300, 36, 48.0),
        "sqr-adamixer-r50-1x-100": (6, 100, 12, 44.5),
        "sqr-adamixer-r101-3x-300": (7, 300, 36, 49.8),
    }
