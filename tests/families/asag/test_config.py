"""Configurations and presets: choices are checked, and every preset can be built."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from asag import build_detector
from asag.families.asag import ASAG
from asag.families.asag.config import ANCHOR_BUDGETS, ASAGConfig
from asag.families.asag.presets import PRESETS


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
        ({"patch_capacity": (0, 4)}, "each level needs at least one place"),
    ],
)
def test_impossible_choices(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.partition(";")[0]) as caught:
        ASAGConfig(**changes)
    assert message in str(caught.value)


def test_numbers_of_the_variants() -> None:
    """README of the family, section 3, table."""
    numbers = {key: dataclasses.astuple(budget) for key, budget in ANCHOR_BUDGETS.items()}
    assert numbers["coco", 100] == (50, 20, 0.10, 5, 200, None)
    assert numbers["coco", 300] == (150, 50, 0.05, 50, 500, None)
    assert numbers["crowdhuman", 300] == (150, 50, 0.05, 50, 600, 60)


@pytest.mark.parametrize(
    ("config", "classes", "detections", "nms"),
    [
        (ASAGConfig(), 80, 100, None),
        (ASAGConfig(queries=300), 80, 100, 0.7),
        (ASAGConfig(queries=300, dataset="crowdhuman"), 1, 600, 0.8),
        (ASAGConfig(queries=50, num_classes=6), 6, 100, None),
    ],
)
def test_what_follows_from_the_choices(config: ASAGConfig, classes: int, detections: int, nms: float | None) -> None:
    assert (config.classes, config.max_detections, config.nms_iou) == (classes, detections, nms)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_built_and_deployed(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        detector = build_detector(preset.config)
    assert preset.config.head in detector.heads
    assert all(side % preset.input.divisor == 0 for side in preset.input.size)
    shorter, longer = preset.input.size
    assert shorter >= preset.input.shorter_side
    assert longer >= preset.input.longer_side
    assert preset.config.budget.most <= 5 * preset.config.budget.fixed_anchors, "the ops select at least that many"


def test_no_more_anchors_are_selected_than_there_are() -> None:
    """GatherAnchors takes the `most` best of at least the 5k anchors of P5 and P6, with every variant."""
    for budget in ANCHOR_BUDGETS.values():
        assert budget.fewest <= budget.most <= 5 * budget.fixed_anchors


def test_stages_follow_the_configuration() -> None:
    names = {stage.name for stage in ASAG.stages(ASAGConfig())}
    assert names > {"features", "coarse_anchors", "P4_patches", "P3_anchors", "anchors", "proposals", "head"}
    fewer = {stage.name for stage in ASAG.stages(ASAGConfig(levels="P4P6"))}
    assert names - fewer == {"P3_patches", "P3_anchors"}
