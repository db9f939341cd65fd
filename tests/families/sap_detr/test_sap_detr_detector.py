"""What holds for any detector of the family: grid, sampling, Gaussians, frames, deployment."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asag.detector import recorded
from asag.families.sap_detr import SAP_DETR
from asag.families.sap_detr.config import ModelSize, SAPDETRConfig
from asag.families.sap_detr.detector import SAPDETRDetector
from asag.families.sap_detr.gaussian import gaussian_bias
from asag.families.sap_detr.geometry import MapFrame, Places, grid_points, logit, moved_points
from asag.families.sap_detr.point_map import at_grid
from asag.families.sap_detr.presets import PRESETS
from tests.builders import normalized_batch, random_picture
from tests.families.sap_detr.small_detector import random_detector, small_config

VARIANTS: dict[str, dict[str, Any]] = {
    "DC5": {},
    "C5": {"dilation": False},
    "content": {"frame": "content"},
    "one layer": {"size": ModelSize(8, 32, 8, 4, 64, 1, 1)},
}
every_variant = pytest.mark.parametrize("config", [small_config(**v) for v in VARIANTS.values()], ids=list(VARIANTS))


def batch() -> tuple[Tensor, Tensor]:
    return normalized_batch([random_picture(1, 90, 150), random_picture(2, 128, 70)], 128, 160)


@torch.no_grad()
@every_variant
def test_every_variant_names_its_stages_and_deploys(config: SAPDETRConfig) -> None:
    detector = random_detector(config)
    with recorded() as values:
        found = detector(*batch())
    assert found.logits.shape == (2, 20, 3)
    assert found.boxes.shape == (2, 20, 4)
    stride = 16 if config.dilation else 32
    assert values["features/p5"].shape == (2, 32, 128 // stride, 160 // stride)
    declared = [name for stage in SAP_DETR.stages(config) for name in stage.value_names()]
    assert set(values) == set(declared)
    deployed = detector.deployed()
    for ours, theirs in zip(found[:2], deployed(*batch())[:2], strict=True):
        assert torch.equal(ours, theirs)
    left_out = sum(each.numel() for each in detector.parameters()) - sum(each.numel() for each in deployed.parameters())
    of_first = sum(each.numel() for each in detector.class_heads[0].parameters())
    assert left_out == 33 + (of_first if len(detector.decoder) > 1 else 0)


@torch.no_grad()
def test_a_batch_gives_what_its_images_give_alone_in_the_same_input() -> None:
    for frame in ("padded", "content"):
        detector, (images, sizes) = random_detector(small_config(frame=frame)), batch()
        together = detector(images, sizes)
        for image in range(2):
            alone = detector(images[image : image + 1], sizes[image : image + 1])
            torch.testing.assert_close(together.logits[image : image + 1], alone.logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(together.boxes[image : image + 1], alone.boxes, rtol=1e-4, atol=1e-5)


def after_the_backbone(detector: SAPDETRDetector, map_: Tensor, sizes: Tensor, input_size: tuple[int, int]) -> Tensor:
    """Logits of a detector with this map in place of the one that it would make of images of such a size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "features", lambda _: [map_])
        return detector(torch.zeros(1, 3, *input_size), sizes).logits


@torch.no_grad()
@settings(deadline=None, max_examples=12)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), st.integers(0, 4))
def test_in_the_frame_of_the_content_padding_is_nothing(h: int, w: int, below: int, beside: int) -> None:
    """The same cells in a larger map give the same; in the padded frame they do not."""
    map_ = torch.randn(1, 32, h, w, generator=torch.Generator().manual_seed(h + 10 * w))
    larger = F.pad(map_, (0, beside, 0, below), value=3.0)
    sizes = torch.tensor([[16.0 * h, 16.0 * w]])
    for frame, same in (("content", True), ("padded", below == beside == 0)):
        detector = detector_of(frame)
        plain = after_the_backbone(detector, map_, sizes, (16 * h, 16 * w))
        padded = after_the_backbone(detector, larger, sizes, (16 * (h + below), 16 * (w + beside)))
        assert torch.allclose(plain, padded, rtol=1e-3, atol=1e-4) is same


_DETECTORS = {frame: random_detector(small_config(frame=frame)) for frame in ("content", "padded")}


def detector_of(frame: str) -> SAPDETRDetector:
    return _DETECTORS[frame]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.integers(1, 7))
def test_the_map_is_read_at_the_grid_as_bilinear_sampling_reads_it(h: int, w: int, columns: int, rows: int) -> None:
    config = small_config(columns=columns, rows=rows)
    map_ = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(h))
    frame = MapFrame.of("padded", (h, w), torch.tensor([[h * 16.0, w * 16.0]] * 2), (h * 16, w * 16))
    places = grid_points(config).expand(2, 1, -1, -1) * 2 - 1
    expected = F.grid_sample(map_, places, align_corners=False)[:, :, 0].transpose(1, 2)
    torch.testing.assert_close(at_grid(map_, frame, config), expected, rtol=1e-5, atol=1e-5)


def test_gaussians_follow_the_formula_cell_by_cell() -> None:
    """Of one query with two heads; the second image is padded."""
    detector, generator = random_detector(small_config()), torch.Generator().manual_seed(0)
    gaussian = detector.decoder[0].gaussian
    queries = torch.randn(2, 1, 32, generator=generator)
    places = Places.of(torch.tensor([[[0.4, 0.6]]] * 2), torch.tensor([[[0.1, 0.2, 0.3, 0.4]]] * 2))
    frame = MapFrame.of("padded", (4, 5), torch.tensor([[64.0, 80.0], [33.0, 80.0]]), (64, 80))
    with torch.no_grad():
        bias = gaussian_bias(gaussian(queries, places, frame), frame).unflatten(-1, (4, 5))
        numbers = gaussian.projection(queries)[:, 0]
    heads = numbers.shape[1] // 4
    for image, u in enumerate(numbers.double().numpy()):
        for head in range(heads):
            (ox, oy), (sx, sy) = np.tanh(u[2 * head : 2 * head + 2]), u[2 * (heads + head) : 2 * (heads + head) + 2]
            cx = 5 * (0.4 + ox * (0.3 if ox >= 0 else 0.1))
            cy = 4 * (0.6 + oy * (0.4 if oy >= 0 else 0.2))
            for i in range(5):
                for j in range(4):
                    expected = -((sx * (i + 0.5 - cx)) ** 2 + (sy * (j + 0.5 - cy)) ** 2) / 8
                    found = float(bias[image, head, 0, j, i])
                    if image == 1 and j > 2:
                        assert found < -1e37
                    else:
                        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=2))
def test_points_stay_in_their_cells(offset: list[float]) -> None:
    config = small_config()
    grid = grid_points(config)
    moved = moved_points(grid, torch.tensor(offset).expand(20, 2), config) - grid
    assert (moved >= 0).all()
    assert (moved <= torch.tensor([1 / 5, 1 / 4]) + 1e-6).all()


def test_the_published_grid() -> None:
    grid = grid_points(SAPDETRConfig())
    assert grid.shape == (306, 2)
    assert grid[0].tolist() == pytest.approx([1e-3 / 1.001] * 2)
    assert grid[305].tolist() == pytest.approx([17 / 18, 16 / 17])
    assert grid[19].tolist() == pytest.approx([1 / 18, 1 / 17])
    assert float(logit(torch.zeros(1))) == pytest.approx(np.log(1e-3))


def test_impossible_configurations_are_refused() -> None:
    for changes, said in (
        ({"backbone": "vgg"}, "backbone is 'vgg'; choose one of resnet10"),
        ({"frame": "input"}, "frame is 'input'; choose one of padded, content"),
        ({"rows": 0}, "rows is 0; a detector needs at least one"),
        ({"size": ModelSize(channels=100)}, "channels is 100; it must be a multiple of attention_heads, 8"),
        ({"size": ModelSize(channels=40)}, "channels is 40; it must be a multiple of norm_groups, 32"),
    ):
        with pytest.raises(ValueError, match=said):
            SAPDETRConfig(**changes)


def test_presets_are_what_was_published() -> None:
    found = {name: preset.published.ap for name, preset in PRESETS.items() if preset.published}
    assert found == {"sap-detr-r50": 43.1, "sap-detr-dc5-r50": 46.0, "sap-detr-r101": 44.4, "sap-detr-dc5-r101": 46.9}
    for name in found:
        config = PRESETS[name].config
        assert (config.queries, config.max_detections, config.dilation) == (306, 300, "dc5" in name)
        assert PRESETS[name].recipe["batch_size"] == (8 if config.dilation else 16)


@pytest.mark.parametrize(("name", "millions"), [("sap-detr-r50", 50.39), ("sap-detr-r101", 69.33)])
def test_as_many_parameters_as_published(name: str, millions: float) -> None:
    """Without batch norms' vectors, and with all rows of classes."""
    with torch.device("meta"):
        detector = SAPDETRDetector(dataclasses.replace(PRESETS[name].config, num_classes=91))
    norms = sum(each.numel() for norm in detector.backbone.norms() for each in norm.parameters())
    count = sum(each.numel() for each in detector.parameters()) - norms
    assert count / 1e6 == pytest.approx(millions, abs=0.005)
