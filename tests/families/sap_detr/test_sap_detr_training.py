"""Losses and gradients against numbers of the published code, and what holds for any training of the family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asag import build_detector
from asag.families.sap_detr.config import FRAMES
from asag.families.sap_detr.detector import SAPDETRDetector
from asag.families.sap_detr.presets import PRESETS
from asag.families.sap_detr.published import PublishedSAPDETR
from asag.families.sap_detr.training.criterion import detection_losses, is_outside, matching_costs
from asag.families.sap_detr.training.forward import LayerPredictions, training_outputs
from asag.families.sap_detr.training.settings import SAPDETRSettings
from asag.families.sap_detr.training.training import SAPDETRTraining
from asag.train.config import TrainConfig
from asag.training.assignment import assign, pad_targets
from asag.training.protocol import Batch, Step, Target
from asag.training.timing import PartTimer
from tests.families.pieces import check_pieces_add_up
from tests.families.sap_detr.golden_cases import FOLDER, golden_batch, golden_detector, names, targets_of
from tests.families.sap_detr.small_detector import random_detector, small_config
from tests.golden_files import module, read_case

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 3e-3
"""Both relative."""

KINDS = {
    "loss_class": "loss_ce",
    "loss_objectness": "loss_ce_obj",
    "loss_l1": "loss_bbox",
    "loss_giou": "loss_giou",
    "loss_outside": "loss_inner",
}


def published_loss(name: str) -> str:
    """What the published code calls one of our losses; the last layer has no number."""
    kind, _, layer = name.rpartition("_")
    return KINDS[kind] + ("" if layer == "5" else f"_{layer}")


def check_losses(losses: Mapping[str, Tensor], weights: Mapping[str, float], meta: Mapping[str, Any]) -> Tensor:
    """All of them, their weights and their weighted sum, which is returned."""
    expected = {name: value for name, value in meta["losses"].items() if name.startswith("loss")}
    assert {published_loss(name) for name in losses} == set(expected)
    for name, value in losses.items():
        wanted = expected[published_loss(name)]
        assert float(value.detach()) == pytest.approx(wanted, rel=LOSS_TOLERANCE, abs=1e-7), name
        assert weights[name] == meta["weights"][published_loss(name)]
    total = torch.stack([value * weights[name] for name, value in losses.items()]).sum()
    assert float(total.detach()) == pytest.approx(meta["total"], rel=LOSS_TOLERANCE)
    return total


def check_matches(outputs: tuple[LayerPredictions, ...], case: Mapping[str, Any]) -> None:
    """Every layer's pairs of query and object."""
    objects = pad_targets(targets_of(case), torch.device("cpu"))
    for layer, pairs in enumerate(assign([matching_costs(found, objects) for found in outputs])):
        for image in range(len(objects.boxes)):
            ours = torch.stack((pairs.query, pairs.target))[:, pairs.group == image]
            theirs = torch.from_numpy(case[f"match_{layer}_{image}"])
            assert torch.equal(ours[:, ours[1].argsort()], theirs[:, theirs[1].argsort()])


@pytest.mark.parametrize("name", names("criterion_"))
def test_losses(goldens: Path, name: str) -> None:
    case, meta = read_case(FOLDER, name)
    given = {key: torch.from_numpy(value) for key, value in case.items() if key.startswith("layer_")}
    parts = ("logits", "objectness", "boxes")
    last = {part: given[f"layer_5_{part}"].requires_grad_() for part in parts}
    outputs = tuple(
        LayerPredictions(*(given[f"layer_{layer}_{part}"] for part in (*parts, "points"))) for layer in range(6)
    )
    outputs = tuple(
        LayerPredictions(each.logits, each.objectness.squeeze(-1), each.boxes, each.points) for each in outputs
    )
    check_matches(outputs, case)
    targets = targets_of(case)
    totals = torch.tensor([float(max(1, sum(len(target["labels"]) for target in targets)))])
    losses = detection_losses(outputs, targets, totals, PartTimer(enabled=False))
    check_losses(losses, {name: meta["weights"][published_loss(name)] for name in losses}, meta).backward()
    for part, value in last.items():
        assert value.grad is not None
        np.testing.assert_allclose(value.grad, case[f"grad_{part}"], rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("name", names("train_step_"))
def test_a_training_step(goldens: Path, name: str) -> None:
    case, meta = read_case(FOLDER, name)
    images, sizes = golden_batch(meta)
    detector = golden_detector(meta["preset"]).train()
    detector.backbone.freeze()
    training = SAPDETRTraining(detector, SAPDETRSettings())
    batch = Batch(images, sizes, targets_of(case))
    outputs = training.outputs(batch, Step(0))
    check_matches(outputs, case)
    losses = training.losses(outputs, batch.targets, training.counts(batch, Step(0)))
    check_losses(losses, training.weights, meta).backward()

    gradients = {key: each.grad for key, each in detector.named_parameters() if each.grad is not None}
    canonical = module(FOLDER).canonical
    seen, least = set(), max(case["grad_norms"]) * 1e-7
    for key, norm in zip(meta["parameters"], case["grad_norms"], strict=True):
        translated = PublishedSAPDETR().translate(canonical(key), torch.zeros(3), detector.config)
        parts = [ours for ours, _ in translated or ()]
        assert parts, key
        whole = torch.cat([gradients[part].flatten() for part in parts]).double()
        assert abs(float(whole.norm()) - norm) / max(norm, least) < GRADIENT_TOLERANCE, key
        seen.update(parts)
    assert seen == set(gradients), "no other parameter trains"
    wanted = case["grad_refbbox_embed"]
    np.testing.assert_allclose(gradients["distances"], wanted, rtol=0, atol=GRADIENT_TOLERANCE * np.abs(wanted).max())
    neck, wanted = gradients["neck.weight"][::16, ::64, 0, 0], case["grad_input_proj"]
    np.testing.assert_allclose(neck, wanted, rtol=0, atol=GRADIENT_TOLERANCE * np.abs(wanted).max())
    golden_detector.cache_clear()


def random_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[96.0, 128.0], [90.0, 70.0]])
    images = torch.randn(2, 3, 96, 128, generator=generator)
    for image, (height, width) in zip(images, sizes.int().tolist(), strict=True):
        image[:, height:], image[:, :, width:] = 0, 0
    boxes = torch.rand(3, 4, generator=generator) * 0.3 + 0.3
    targets: list[Target] = [
        {"boxes": boxes, "labels": torch.tensor([0, 2, 1])},
        {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return Batch(images, sizes, targets)


@pytest.mark.parametrize("frame", FRAMES)
def test_the_last_layer_says_in_training_what_the_detector_says(frame: str) -> None:
    detector, batch = random_detector(small_config(frame=frame)), random_batch()
    with torch.no_grad():
        outputs = training_outputs(detector, batch, Step(0))
        plain = detector(batch.images, batch.sizes)
    assert len(outputs) == 3
    assert torch.equal(outputs[-1].logits, plain.logits)
    assert torch.equal(outputs[-1].boxes, plain.boxes)


def test_every_parameter_learns_and_has_a_rate() -> None:
    detector, batch = random_detector().train(), random_batch()
    training = SAPDETRTraining(detector, SAPDETRSettings(distances_rate=3.0, class_weight=2.0))
    totals = training.counts(batch, Step(0))
    assert totals.tolist() == [3]
    losses = training.losses(training.outputs(batch, Step(0)), batch.targets, totals)
    assert set(losses) == set(training.weights) == set(training.parts)
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, each in detector.named_parameters() if each.grad is None] == []
    assert (training.weights["loss_class_1"], training.weights["loss_l1_1"]) == (2, 5)
    groups = training.parameter_groups()
    assert sum(len(group.parameters) for group in groups) == len(list(detector.parameters()))
    assert [(group.backbone, group.factor) for group in groups] == [(False, 1.0), (True, 1.0), (False, 3.0)]
    assert groups[-1].parameters == (detector.distances,)


def test_losses_of_two_pieces_add_up_to_those_of_the_whole_step() -> None:
    training, batch = SAPDETRTraining(random_detector(), SAPDETRSettings()), random_batch()
    check_pieces_add_up(training, batch)


def test_points_outside_cost_more_than_all_else_without_hiding_it() -> None:
    """Of two queries outside, the one with the better box is cheaper, by as much as it is without that cost."""
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2 + 1e-6], [0.9, 0.9, 0.1, 0.1]]])
    points = torch.tensor([[[0.1, 0.1], [0.1, 0.1], [0.55, 0.45]]])
    found = LayerPredictions(torch.zeros(1, 3, 2), torch.zeros(1, 3), boxes, points)
    objects = pad_targets([{"boxes": boxes[0, :1], "labels": torch.tensor([1])}], torch.device("cpu"))
    first, second, inside = matching_costs(found, objects)[0, :, 0].tolist()
    assert inside < 100
    assert 9000 < first < second
    # L1 of half of it at top and bottom, and as much of the generalized IoU as the height is longer.
    assert second - first == pytest.approx(5 * 1e-6 + 2 * 1e-6 / 0.2, rel=0.2)
    assert not is_outside(torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5, 0.5, 0.5])), "on the border is in"


def test_recipes() -> None:
    for name in ("distances_rate", "class_weight"):
        with pytest.raises(ValueError, match=f"{name} is 0; it is a factor above 0"):
            SAPDETRSettings(**{name: 0.0})
    for name, preset in PRESETS.items():
        config = TrainConfig.for_preset(name, ".", ".")
        assert config.background_images is bool(preset.published)
        if preset.published:
            assert (config.epochs, config.milestones, config.warmup_steps) == (50, (40,), 1000)
            assert (config.learning_rate, config.backbone_learning_rate, config.gradient_clip) == (1e-4, 1e-5, 0.1)
            assert (config.weight_decay, config.ema_decay, config.warmup_start) == (1e-4, None, 0.001)
            assert config.settings == SAPDETRSettings()
            assert config.batch_size == (8 if preset.config.dilation else 16)


def test_training_starts_as_published() -> None:
    detector = build_detector(small_config()).requires_grad_(False)
    assert isinstance(detector, SAPDETRDetector)
    prior = pytest.approx(-np.log(99))
    assert detector.objectness.bias.tolist() == [prior]
    for head in detector.class_heads:
        assert head[-1].bias.tolist() == [prior] * 3
    for head in detector.place_heads:
        last = (*head.point[-1].parameters(), *head.distances[-1].parameters())
        assert not any(parameter.any() for parameter in last)
        assert torch.equal(head.point[0].weight, detector.place_heads[0].point[0].weight)
    limit = (6 / (32 + 32)) ** 0.5
    for weight in (detector.decoder[0].cross_attention.key.weight, detector.encoder.layers[0].attention.query.weight):
        assert 0.9 * limit < float(weight.abs().max()) <= limit
    assert detector.distances.std() == pytest.approx(1, abs=0.2)
