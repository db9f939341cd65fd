"""Losses and gradients against numbers of the published code, and what holds for any training of the family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asag.families.sap_detr.published import PublishedSAPDETR
from asag.families.sap_detr.training.criterion import detection_losses, matching_costs
from asag.families.sap_detr.training.forward import LayerPredictions
from asag.families.sap_detr.training.training import SAPDETRTraining
from asag.training.assignment import assign, pad_targets
from asag.training.protocol import Batch, Step
from asag.training.timing import PartTimer
from tests.families.sap_detr.golden_cases import FOLDER, golden_batch, golden_detector, names, targets_of
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
        assert float(value.detach()) == pytest.approx(expected[published_loss(name)], rel=LOSS_TOLERANCE, abs=1e-7), name
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
    training = SAPDETRTraining(detector)
    batch = Batch(images, sizes, targets_of(case))
    outputs = training.outputs(batch, Step(0))
    check_matches(outputs, case)
    losses = training.losses(outputs, batch.targets, training.counts(batch, Step(0)))
    check_losses(losses, training.weights, meta).backward()

    gradients = {key: each.grad for key, each in detector.named_parameters() if each.grad is not None}
    canonical = module(FOLDER).canonical
    seen, least, worst = set(), max(case["grad_norms"]) * 1e-7, []
    for key, norm in zip(meta["parameters"], case["grad_norms"], strict=True):
        parts = [ours for ours, _ in PublishedSAPDETR().translate(canonical(key), torch.zeros(3), detector.config) or ()]
        assert parts, key
        whole = torch.cat([gradients[part].flatten() for part in parts]).double()
        difference = abs(float(whole.norm()) - norm) / max(norm, least)
        worst.append(difference)
        assert difference < GRADIENT_TOLERANCE, key
        seen.update(parts)
    print(sorted(worst)[-5:], np.median(worst))
    assert seen == set(gradients), "no other parameter trains"
    wanted = case["grad_refbbox_embed"]
    np.testing.assert_allclose(gradients["distances"], wanted, rtol=0, atol=GRADIENT_TOLERANCE * np.abs(wanted).max())
    neck, wanted = gradients["neck.weight"][::16, ::64, 0, 0], case["grad_input_proj"]
    np.testing.assert_allclose(neck, wanted, rtol=0, atol=GRADIENT_TOLERANCE * np.abs(wanted).max())
    golden_detector.cache_clear()
