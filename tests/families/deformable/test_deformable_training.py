"""Losses and gradients against numbers of the published code, and what holds for any training of the family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from asag.families.deformable.presets import PRESETS
from asag.families.deformable.published import PublishedDeformable
from asag.families.deformable.training.attention_map import decoder_attention_map, kept_shares, wanted_tokens
from asag.families.deformable.training.criterion import KEPT_SHARES, SELECTION, detection_losses
from asag.families.deformable.training.forward import Selection, TrainingOutputs, training_outputs
from asag.families.deformable.training.settings import DeformableSettings
from asag.families.deformable.training.training import DeformableTraining
from asag.parts.deformable_attention import Sampling
from asag.train.config import TrainConfig
from asag.training.protocol import Batch, Step, Target
from asag.training.recollection import StagePredictions
from asag.training.timing import PartTimer
from tests.families.deformable.golden_cases import SPARSE, config_of, golden_batch, golden_detector, names, targets_of
from tests.families.deformable.small_detector import PLAIN, random_detector, small_config
from tests.families.pieces import check_pieces_add_up
from tests.golden_files import module, read_case

LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 3e-3
"""Both relative."""

KINDS = {"loss_class": "loss_ce", "loss_l1": "loss_bbox", "loss_giou": "loss_giou"}


def published_loss(name: str) -> str:
    """What the published code calls one of our losses; the last layer has no number."""
    if name == SELECTION:
        return "loss_mask_prediction"
    if name in KEPT_SHARES:
        return f"corr_mask_attn_map_dec{name.removeprefix(KEPT_SHARES[0]) or '_all'}"
    kind, _, output = name.removeprefix("loss_").partition("_")
    output = output.replace("proposals", "enc").replace("encoder", "enc")
    return KINDS[f"loss_{kind}"] + ("" if output == "5" else f"_{output}")


def check_losses(losses: Mapping[str, Tensor], weights: Mapping[str, float], meta: Mapping[str, Any]) -> Tensor:
    """All of them, their weights and their weighted sum, which is returned."""
    expected = {name: value for name, value in meta["losses"].items() if name.startswith(("loss", "corr"))}
    assert {published_loss(name) for name in losses} == set(expected)
    for name, value in losses.items():
        assert float(value.detach()) == pytest.approx(expected[published_loss(name)], rel=LOSS_TOLERANCE), name
        assert weights[name] == meta["weights"].get(published_loss(name), 0)
    total = torch.stack([value * weights[name] for name, value in losses.items()]).sum()
    assert float(total.detach()) == pytest.approx(meta["total"], rel=LOSS_TOLERANCE)
    return total


def given_selection(case: Mapping[str, Tensor], dam: NDArray) -> Selection:
    shapes = tuple((int(height), int(width)) for height, width in case["spatial_shapes"])
    layers = zip(case["sampling_locations_dec"].unbind(1), case["attn_weights_dec"].unbind(1), strict=True)
    samplings = [Sampling(locations.flatten(3, 4), weights.flatten(3, 4)) for locations, weights in layers]
    attention_map = decoder_attention_map(samplings, shapes)
    np.testing.assert_allclose(attention_map, dam, rtol=1e-5, atol=1e-4)
    counts = case["sparse_token_nums"].long()
    wanted = wanted_tokens(attention_map, case["mask_flatten"].bool(), counts, int(counts.max()))
    shares = kept_shares(attention_map, case["backbone_topk_proposals"].long(), shapes)
    return Selection(case["backbone_mask_prediction"], wanted, shares)


@pytest.mark.parametrize("name", names(SPARSE, "criterion_"))
def test_losses(goldens: Path, name: str) -> None:
    arrays, meta = read_case(SPARSE, name)
    case = {key: torch.from_numpy(value).float() for key, value in arrays.items()}

    def predictions(start: str) -> StagePredictions:
        return StagePredictions(case[f"{start}pred_logits"][None], case[f"{start}pred_boxes"][None])

    config = config_of(meta["options"])
    outputs = TrainingOutputs(
        (*(predictions(f"aux_outputs_{layer}_") for layer in range(5)), predictions("")),
        predictions("enc_outputs_") if config.two_stage else None,
        tuple(predictions(f"aux_outputs_enc_{layer}_") for layer in range(5)) if config.encoder_heads else (),
        given_selection(case, arrays["dam"]) if config.sparse else None,
    )
    targets = targets_of(arrays, meta["batch"])
    objects = max(1, sum(len(target["labels"]) for target in targets))
    totals = torch.tensor([float(objects), float(len(targets))])
    losses = detection_losses(config, outputs, targets, totals, PartTimer(enabled=False))
    check_losses(losses, {name: meta["weights"].get(published_loss(name), 0) for name in losses}, meta)


@pytest.mark.parametrize("name", names(SPARSE, "train_"))
def test_a_training_step(goldens: Path, name: str) -> None:
    case, meta = read_case(SPARSE, name)
    images, sizes = golden_batch(meta)
    targets = targets_of(case, len(images))
    detector = golden_detector(SPARSE, meta).train()
    detector.backbone.freeze()
    training = DeformableTraining(detector, DeformableSettings())
    batch = Batch(images, sizes, targets)
    losses = training.losses(training.outputs(batch, Step(0)), targets, training.counts(batch, Step(0)))
    check_losses(losses, training.weights, meta).backward()

    gradients = {key: each.grad for key, each in detector.named_parameters() if each.grad is not None}
    published, least = PublishedDeformable(), max(meta["gradient_norms"].values()) * 1e-4
    owners = {  # the first layer's head stands for all that have none
        ours: key
        for key in sorted(meta["gradient_norms"])
        for ours, _ in published.translate(key, torch.zeros(3), detector.config) or ()
    }
    seen = set()
    for key, norm in meta["gradient_norms"].items():
        parts = [ours for ours, owner in owners.items() if owner == key]
        assert parts, key
        whole = torch.cat([gradients[part] for part in parts])
        assert abs(float(whole.norm()) - norm) / max(norm, least) < GRADIENT_TOLERANCE, key
        if (wanted := case.get(f"grad {key}")) is not None:
            ours = whole.flatten()[module(SPARSE).sample_positions(key, whole.numel())]
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=GRADIENT_TOLERANCE * np.abs(wanted).max())
        seen.update(parts)
    assert seen == set(gradients), "no other parameter trains"


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


@pytest.mark.parametrize("preset", [PLAIN, "sparse-detr-tiny"])
def test_the_last_layer_says_in_training_what_the_detector_says(preset: str) -> None:
    """Static places for kept tokens, and as many as the batch needs, are the same."""
    detector, batch = random_detector(small_config(preset)), random_batch()
    with torch.no_grad():
        outputs = training_outputs(detector, batch, Step(0), "none")
        plain = detector(batch.images, batch.sizes)
    torch.testing.assert_close(outputs.decoder[-1].logits[0], plain.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.decoder[-1].boxes[0], plain.boxes, rtol=1e-4, atol=1e-5)


def test_recollected_copies_are_the_same_in_turn_and_at_once() -> None:
    detector, batch = random_detector(small_config(PLAIN, dropout=0.0)), random_batch()
    with torch.no_grad():
        found = {name: training_outputs(detector, batch, Step(0), name) for name in ("one_by_one", "batched")}
        plain = training_outputs(detector, batch, Step(0), "none")
    assert [len(each.logits) for each in found["batched"].decoder] == [1, 2, 3]
    for layer, each in enumerate(found["batched"].decoder):
        other = found["one_by_one"].decoder[layer]
        torch.testing.assert_close(each.logits, other.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(each.boxes, other.boxes, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(each.boxes[-1], plain.decoder[layer].boxes[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", [PLAIN, "sparse-detr-tiny"])
def test_every_parameter_learns_and_has_a_rate(preset: str) -> None:
    detector, batch = random_detector(small_config(preset)).train(), random_batch()
    training = DeformableTraining(detector, DeformableSettings())
    totals = training.counts(batch, Step(0))
    assert totals.tolist() == [3, 2]
    losses = training.losses(training.outputs(batch, Step(0)), batch.targets, totals)
    assert set(losses) == set(training.weights)
    assert set(training.parts) == {name for name, weight in training.weights.items() if weight}
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, each in detector.named_parameters() if each.requires_grad and each.grad is None] == []
    groups = training.parameter_groups()
    assert sum(len(group.parameters) for group in groups) == sum(each.requires_grad for each in detector.parameters())
    assert [(group.backbone, group.factor) for group in groups] == [(False, 1.0), (False, 0.1), (True, 1.0)]
    names_of = {id(each): name for name, each in detector.named_parameters()}
    slow = {names_of[id(each)] for each in groups[1].parameters}
    assert all("offsets" in name or "reference_points" in name for name in slow)
    assert len(slow) == 2 * (2 + 3) + (2 if preset == PLAIN else 0)


def test_losses_of_two_pieces_add_up_to_those_of_the_whole_step() -> None:
    """Images that are alike in size: the padding, and so the group norms' statistics, are the same."""
    detector = random_detector(small_config(dropout=0.0))
    training, batch = DeformableTraining(detector, DeformableSettings()), random_batch()
    batch = batch._replace(sizes=batch.sizes[:1].expand(2, -1))
    check_pieces_add_up(training, batch)


def test_the_attention_map_counts_from_the_first_cell() -> None:
    """A weight of 1 at (0.75, 1.25) cells of a map of 3 rows and 2 columns: a quarter of it falls outside."""
    sampling = Sampling(torch.tensor([1.25 / 2, 0.75 / 3]).reshape(1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1))
    found = decoder_attention_map([sampling, sampling], ((3, 2),)).reshape(3, 2)
    expected = 2 * torch.tensor([[0, 0.25 * 0.75], [0, 0.75 * 0.75], [0, 0]])
    torch.testing.assert_close(found, expected)
    padded = torch.tensor([[False, True, False, True, False, True]])
    found = wanted_tokens(torch.tensor([[1.0, 9.0, 3.0, 9.0, 2.0, 9.0]]), padded, torch.tensor([2]), 3)
    assert found.tolist() == [[0, 0, 1, 0, 1, 0]]


def test_settings_and_recipes() -> None:
    with pytest.raises(ValueError, match="recollection is 'sqr'; choose one of none, one_by_one, batched"):
        DeformableSettings("sqr")
    with pytest.raises(ValueError, match="this one refines its boxes"):
        DeformableTraining(random_detector(), DeformableSettings("batched"))
    for name in PRESETS:
        config = TrainConfig.for_preset(name, ".", ".")
        assert config.settings.recollection == ("batched" if name.startswith("sqr") else "none")
        if "tiny" not in name:
            assert (config.epochs, config.milestones, config.warmup_steps) == (50, (40,), 0)
            assert (config.learning_rate, config.backbone_learning_rate, config.gradient_clip) == (2e-4, 2e-5, 0.1)
            assert config.crop_probability == 0.5
            assert config.batch_size == (32 if name.startswith("sqr") else 16)
