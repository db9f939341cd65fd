"""Configurations and presets: choices are checked, survive JSON, and need no PyTorch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from asag.config import ANCHOR_BUDGETS, DetectorConfig, ModelSize
from asag.presets import PRESETS, find_preset

from asag.detector import Detector


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": "yolo"}, "decoder is 'yolo'; choose one of adamixer, sparse_rcnn"),
        ({"backbone": "vgg"}, "backbone is 'vgg'"),
        ({"levels": "P2P6"}, "levels is 'P2P6'; choose one of P3P6, P4P6, P5P6"),
        ({"dataset": "voc"}, "dataset is 'voc'"),
        ({"head": "last"}, "head is 'last'"),
        ({"queries": 17}, "queries is 17; dataset 'coco' is defined for 50, 100, 300"),
        ({"queries": 100, "dataset": "crowdhuman"}, "dataset 'crowdhuman' is defined for 300"),
        ({"num_classes": 0}, "at least one class"),
    ],
)
def test_impossible_choices(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.partition(";")[0]) as caught:
        DetectorConfig(**changes)
    assert message in str(caught.value)


def test_numbers_of_the_variants() -> None:
    """Specification section 3, table."""
    numbers = {key: dataclasses.astuple(budget) for key, budget in ANCHOR_BUDGETS.items()}
    assert numbers["coco", 100] == (50, 20, 0.10, 5, 200, None)
    assert numbers["coco", 300] == (150, 50, 0.05, 50, 500, None)
    assert numbers["crowdhuman", 300] == (150, 50, 0.05, 50, 600, 60)


@pytest.mark.parametrize(
    ("config", "classes", "detections", "nms"),
    [
        (DetectorConfig(), 80, 100, None),
        (DetectorConfig(queries=300), 80, 100, 0.7),
        (DetectorConfig(queries=300, dataset="crowdhuman"), 1, 600, 0.8),
        (DetectorConfig(queries=50, num_classes=6), 6, 100, None),
    ],
)
def test_what_follows_from_the_choices(
    config: DetectorConfig, classes: int, detections: int, nms: float | None
) -> None:
    assert (config.classes, config.max_detections, config.nms_iou) == (classes, detections, nms)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = PRESETS[name].config
    assert DetectorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_sizes_survive_json() -> None:
    config = DetectorConfig(size=ModelSize(channels=128, sampling_groups=2), levels="P5P6")
    assert DetectorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown detector options \['colour'\]"):
        DetectorConfig.from_dict({"colour": "red"})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_built_and_deployed(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        detector = Detector(preset.config)
    assert preset.head in detector.heads
    assert all(side % 32 == 0 for side in preset.input_size)
    shorter, longer = preset.input_size
    assert shorter >= preset.shorter_side
    assert longer >= preset.longer_side
    assert preset.config.budget.most <= 5 * preset.config.budget.fixed_anchors, "the ops select at least that many"


def test_no_more_anchors_are_selected_than_there_are() -> None:
    """GatherAnchors takes the `most` best of at least the 5k anchors of P5 and P6, with every variant."""
    for budget in ANCHOR_BUDGETS.values():
        assert budget.fewest <= budget.most <= 5 * budget.fixed_anchors


def test_an_unknown_preset_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"no preset 'asag'; the presets are asag-a-tiny, asag-a-r50-1x-100"):
        find_preset("asag")
    assert find_preset("asag-a-tiny") is PRESETS["asag-a-tiny"]


def test_presets_need_no_torch() -> None:
    code = "import asag, sys; asag.find_preset('asag-a-tiny').config.to_dict(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
