"""The deployed detector: the same numbers from fewer tensors, and a description that the runtime understands."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from asag.deploy import DeployedDetector, weights_digest
from asag.families.asag.config import HEADS
from asag.families.asag.detector import ASAGDetector
from asag.parts.boxes import cxcywh_to_xyxy
from asag.runtime.metadata import ModelMetadata
from tests.builders import (
    CATEGORY_IDS,
    normalized_batch,
    random_detector,
    random_picture,
    small_config,
    small_info,
    uint8_batch,
)
from tests.families.asag.everything import all_stages


@pytest.fixture(scope="module")
def detector() -> ASAGDetector:
    return random_detector(small_config(head="aux_1"))


@pytest.fixture(scope="module")
def deployed(detector: ASAGDetector) -> DeployedDetector:
    return DeployedDetector(detector, small_info(), input_type="float32")


@torch.no_grad()
def test_detections_are_the_best_pairs_of_the_full_detector(detector: ASAGDetector, deployed: DeployedDetector) -> None:
    """Every pair of a valid query and a class, by score, from the detector with all heads and unfolded norms."""
    images, sizes = normalized_batch([random_picture(1, 160, 192), random_picture(2, 70, 120)], 160, 192)
    boxes, scores, labels, overflow = deployed(images, sizes)
    assert boxes.shape == (2, 100, 4)
    assert (scores.shape, labels.shape, overflow.shape) == ((2, 100), (2, 100), (2,))
    assert (labels.dtype, overflow.dtype) == (torch.int64, torch.int32)
    assert not overflow.any()
    stages = all_stages(detector, images, sizes)
    for image in range(2):
        valid = stages["valid"][image]
        expected = stages["aux_1_logits"][image, valid].sigmoid()
        corners = cxcywh_to_xyxy(stages["aux_1_boxes"][image, valid])
        best, place = expected.flatten().sort(descending=True)
        count = min(len(best), 100)
        torch.testing.assert_close(scores[image, :count], best[:count], rtol=0, atol=1e-5)
        assert not scores[image, count:].any()
        # Every detection has the box and score of a pair; the order of near-equal scores may differ.
        for box, score, label in zip(boxes[image, :count], scores[image, :count], labels[image, :count], strict=True):
            near = (expected[:, CATEGORY_IDS.index(int(label))] - score).abs() < 1e-5
            assert (corners[near] - box).abs().amax(dim=1).min() < 1e-4
        assert len(place[:count].unique()) == count


def test_the_other_heads_are_left_out(detector: ASAGDetector, deployed: DeployedDetector) -> None:
    assert list(deployed.detector.heads) == ["aux_1"]
    assert not [module for module in deployed.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(parameter.requires_grad for parameter in deployed.parameters())


def test_the_original_stays_as_it_is() -> None:
    detector = random_detector().train()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    deployed = DeployedDetector(detector, small_info())
    assert tuple(detector.heads) == HEADS
    assert detector.training
    assert not deployed.detector.training
    assert all(parameter.requires_grad for parameter in detector.parameters())
    assert {name: value.shape for name, value in before.items()} == {
        name: value.shape for name, value in detector.state_dict().items()
    }
    with torch.no_grad():
        deployed.detector.head_embedding.weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_description_is_the_runtimes_metadata() -> None:
    detector = random_detector(small_config(head="aux_1", patch_capacity=(2, 3)))
    deployed = DeployedDetector(detector, small_info((96, 128)))
    metadata = ModelMetadata(**deployed.describe())
    assert ModelMetadata.from_properties(metadata.to_properties()) == metadata
    assert metadata.input_size == (96, 128)
    assert metadata.input_type == "uint8"
    assert metadata.choices == {"head": "aux_1", "levels": "P3P6", "patch_capacity": [2, 3]}
    assert metadata.stages == deployed.stages
    assert metadata.category_ids == CATEGORY_IDS
    assert metadata.weights_digest == weights_digest(detector)


def test_the_exported_model_resizes_as_the_checkpoint_says() -> None:
    detector, info = random_detector(small_config()), small_info((96, 128))
    info = dataclasses.replace(info, input=dataclasses.replace(info.input, interpolation="bilinear"))
    assert ModelMetadata(**DeployedDetector(detector, info).describe()).interpolation == "bilinear"


def test_digest_follows_the_weights() -> None:
    detector = random_detector(seed=4)
    digest = weights_digest(detector)
    assert len(digest) == 64
    assert weights_digest(random_detector(seed=4)) == digest
    assert DeployedDetector(detector, small_info()).describe()["weights_digest"] == digest
    with torch.no_grad():
        detector.backbone.bn1.running_mean[0] += 1e-6
    changed = weights_digest(detector)
    assert changed != digest
    with torch.no_grad():
        detector.heads["aux_0"].branches.class_logits.bias[0] += 1e-6
    assert weights_digest(detector) not in (digest, changed)


@torch.no_grad()
def test_what_lies_in_the_padding_does_not_matter(detector: ASAGDetector) -> None:
    deployed = DeployedDetector(detector, small_info())
    images, sizes = uint8_batch([random_picture(3, 90, 100)], 160, 192)
    expected = deployed(images, sizes)
    images[:, :, 90:] = 77
    images[:, :, :, 100:] = 200
    for found, value in zip(deployed(images, sizes), expected, strict=True):
        assert torch.equal(found, value)


@torch.no_grad()
def test_input_size_may_differ_from_the_checkpoints(detector: ASAGDetector) -> None:
    deployed = DeployedDetector(detector, small_info(), input_size=(128, 256))
    boxes, *_ = deployed(*uint8_batch([random_picture(4, 128, 250)], 128, 256))
    assert boxes.isfinite().all()
    assert deployed.describe()["input_width"] == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": (100, 128)}, r"input size is \(100, 128\); height and width must be multiples of 32"),
        ({"input_size": (0, 32)}, "multiples of 32"),
        ({"input_type": "float16"}, "input type is 'float16'; choose one of uint8, float32"),
    ],
)
def test_impossible_options(detector: ASAGDetector, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeployedDetector(detector, small_info(), **options)
    assert tuple(detector.heads) == HEADS


@pytest.mark.parametrize(
    ("queries", "dataset", "nms"), [(50, "coco", None), (300, "coco", 0.7), (300, "crowdhuman", 0.8)]
)
def test_suppression_is_named_in_the_description(queries: int, dataset: str, nms: float | None) -> None:
    config = small_config(queries=queries, dataset=dataset, num_classes=1)
    info = dataclasses.replace(small_info(), category_ids=(1,), category_names=("person",))
    described = DeployedDetector(random_detector(config), info).describe()
    assert described["nms_iou"] == nms
    assert described["max_detections"] == (600 if dataset == "crowdhuman" else 100)
