"""AdaMixer's losses and recollection against numbers of the published implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from asag.families.adamixer.detector import AdaMixerDetector
from asag.families.adamixer.presets import PRESETS
from asag.families.adamixer.published import translate_name
from asag.families.adamixer.training.criterion import COORDINATES, FOCAL_EPSILON
from asag.families.adamixer.training.forward import training_outputs
from asag.families.adamixer.training.settings import AdaMixerSettings
from asag.families.adamixer.training.training import AdaMixerTraining
from asag.parts.boxes import content_scale, cxcywh_to_xyxy
from asag.train.config import TrainConfig
from asag.training.assignment import assign, pad_targets
from asag.training.protocol import Batch, Step, Target
from asag.training.recollection import StagePredictions, recollected_copies
from asag.training.set_losses import LOSSES, WEIGHTS, copy_losses, matching_costs
from benchmarks.training import random_pieces
from tests.families.adamixer.golden_cases import FOLDER, golden_batch, golden_detector, read_case
from tests.families.adamixer.small_detector import random_detector, small_config
from tests.train.test_step import make_step

LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 3e-3
"""Both relative."""

CRITERION_CASES = sorted(path.stem for path in FOLDER.glob("criterion_adamixer*.npz"))


def as_fractions(corners: Tensor, sizes: Tensor) -> Tensor:
    """Corners in pixels [..., B, N, 4] -> `cxcywh`, fractions of the contents [B, 2]."""
    low, high = corners.split(2, dim=-1)
    return torch.cat(((low + high) / 2, high - low), dim=-1) / content_scale(sizes)


def targets_of(case: dict[str, NDArray], sizes: Tensor) -> list[Target]:
    found = []
    for image in range(len(sizes)):
        corners = torch.from_numpy(case[f"target{image}_boxes"]).reshape(1, -1, 4)
        boxes = as_fractions(corners, sizes[image : image + 1])[0]
        found.append({"boxes": boxes, "labels": torch.from_numpy(case[f"target{image}_labels"]).long()})
    return found


def pairs_of(targets: list[Target], queries: int) -> int:
    return max(1, sum(min(queries, len(target["labels"])) for target in targets))


def matched_queries(groups: Any, group: int, objects: int) -> list[int]:
    """For each object of a group its query, -1 where it has none."""
    found = [-1] * objects
    for own, query, target in zip(groups.group.tolist(), groups.query.tolist(), groups.target.tolist(), strict=True):
        if own == group:
            found[target] = query
    return found


@pytest.mark.parametrize("name", CRITERION_CASES or ["none"])
def test_losses_and_their_gradients(goldens: Path, name: str) -> None:
    case, meta = read_case(name)
    sizes = torch.from_numpy(case["image_sizes_hw"]).float()
    targets = targets_of(case, sizes)
    objects = pad_targets(targets, torch.device("cpu"))
    copies = range(len(meta["losses"]))
    logits = [torch.from_numpy(case[f"copy{copy}_logits"]).requires_grad_() for copy in copies]
    corners = [torch.from_numpy(case[f"copy{copy}_boxes"]).requires_grad_() for copy in copies]
    found = StagePredictions(torch.stack(logits), as_fractions(torch.stack(corners), sizes))
    (matches,) = assign([matching_costs(found, objects, COORDINATES, FOCAL_EPSILON)])
    for copy in copies:
        for image, target in enumerate(targets):
            ours = matched_queries(matches, copy * len(sizes) + image, len(target["labels"]))
            assert ours == case[f"copy{copy}_image{image}_matched"].tolist()
    pairs = pairs_of(targets, meta["queries"])
    losses = copy_losses(found, objects, matches, COORDINATES) * torch.tensor(WEIGHTS).unsqueeze(1) / pairs
    expected = torch.tensor([[entry[kind] for entry in meta["losses"]] for kind in ("class", "l1", "giou")])
    torch.testing.assert_close(losses.detach(), expected, rtol=LOSS_TOLERANCE, atol=0)
    total = losses.sum()
    total.backward()
    assert float(total.detach()) == pytest.approx(meta["total"], rel=LOSS_TOLERANCE)
    for copy in copies:
        gradient = logits[copy].grad
        assert gradient is not None
        assert float(gradient.norm()) == pytest.approx(float(case[f"copy{copy}_gradient_logits_norm"]), rel=1e-4)
        wanted = case[f"copy{copy}_gradient_boxes"]
        assert corners[copy].grad is not None
        np.testing.assert_allclose(corners[copy].grad, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "recollection"),
    [("train_adamixer", "one_by_one"), ("train_adamixer", "batched"), ("train_adamixer_plain", "none")],
)
def test_a_training_step(goldens: Path, name: str, recollection: str) -> None:
    case, meta = read_case(name)
    images, sizes = golden_batch(meta)
    targets = targets_of(case, sizes)
    detector = golden_detector(meta).train()
    detector.backbone.freeze()
    training = AdaMixerTraining(detector, AdaMixerSettings(recollection))
    batch = Batch(images, sizes, targets)
    outputs = training.outputs(batch, Step(0))
    check_copies(case, outputs, targets, sizes)

    totals = training.counts(batch, Step(0))
    assert float(totals) == pairs_of(targets, meta["options"]["queries"])
    losses = training.losses(outputs, targets, totals)
    for stage in range(meta["options"]["stages"]):
        entries = [entry for entry in meta["losses"] if entry["stage"] == stage]
        assert len(entries) == outputs[stage].logits.shape[0]
        for kind, loss in zip(("class", "l1", "giou"), LOSSES, strict=True):
            found = float(losses[f"{loss}_{stage}"].detach()) * training.weights[f"{loss}_{stage}"]
            assert found == pytest.approx(sum(entry[kind] for entry in entries), rel=LOSS_TOLERANCE)
    total = torch.stack([value * training.weights[kind] for kind, value in losses.items()]).sum()
    assert float(total.detach()) == pytest.approx(meta["total"], rel=LOSS_TOLERANCE)
    total.backward()
    check_gradients(detector, meta["gradient_norms"])


def check_copies(
    case: dict[str, NDArray], outputs: tuple[StagePredictions, ...], targets: list[Target], sizes: Tensor
) -> None:
    objects = pad_targets(targets, torch.device("cpu"))
    matches = assign([matching_costs(found, objects, COORDINATES, FOCAL_EPSILON) for found in outputs])
    for stage, found in enumerate(outputs):
        corners = cxcywh_to_xyxy(found.boxes.detach()) * content_scale(sizes)
        for copy in range(len(found.logits)):
            name = f"stage{stage}_copy{copy}"
            np.testing.assert_allclose(
                found.logits[copy].detach()[..., ::10], case[f"{name}_logits"], rtol=0, atol=1e-4, err_msg=name
            )
            np.testing.assert_allclose(corners[copy], case[f"{name}_boxes"], rtol=0, atol=3e-3, err_msg=name)
            for image, target in enumerate(targets):
                ours = matched_queries(matches[stage], copy * len(sizes) + image, len(target["labels"]))
                assert ours == case[f"{name}_image{image}_matched"].tolist()


def check_gradients(detector: AdaMixerDetector, expected: dict[str, float]) -> None:
    """Every norm relative to itself or to a ten-thousandth of the largest; no other parameter trains."""
    ours = {translate_name(name): norm for name, norm in expected.items()}
    found = {name: float(p.grad.norm()) for name, p in detector.named_parameters() if p.grad is not None}
    assert set(found) == set(ours)
    least = max(expected.values()) * 1e-4
    worst = max(abs(found[name] - norm) / max(norm, least) for name, norm in ours.items() if name)
    assert worst < GRADIENT_TOLERANCE


@pytest.mark.parametrize(
    ("recollection", "counts"),
    [("none", [1, 1, 1, 1, 1]), ("batched", [1, 2, 3, 5, 8]), ("one_by_one", [1, 2, 3, 5, 8])],
)
def test_copies_of_every_stage(recollection: str, counts: list[int]) -> None:
    """One, two, and from there as many as of the two stages before; the last is the ordinary path."""
    detector = random_detector(small_config(stages=5))
    batch = Batch(torch.randn(2, 3, 64, 96), torch.tensor([[60.0, 90.0], [64.0, 50.0]]), [])
    with torch.no_grad():
        outputs = training_outputs(detector, batch, Step(0), recollection)
        plain = detector(batch.images, batch.sizes)
    assert [len(found.logits) for found in outputs] == counts
    if recollection != "none":
        assert recollected_copies(5) == tuple(counts)
        (remark,) = AdaMixerTraining(detector, AdaMixerSettings(recollection)).remarks
        assert remark.startswith(f"recollection: 19 copies of 5 stages a step, {recollection}: ")
    torch.testing.assert_close(outputs[-1].logits[-1], plain.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[-1].boxes[-1], plain.boxes, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def whole_step() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of a step in one piece, all copies at once."""
    return made_step("batched", pieces=1)


def made_step(recollection: str, pieces: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same four images and weights each time."""
    config = TrainConfig.for_preset(
        *("adamixer-tiny", ".", "."),
        batch_size=4,
        accumulate=pieces,
        device="cpu",
        gradient_clip=1e9,
        recollection=recollection,
    )
    detector = random_detector(small_config(train_batch_statistics=False)).train()
    maker, _ = make_step(detector, config)
    losses = maker.make(random_pieces(config, 96, 128, 3), 0).losses
    return losses, {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("recollection", "pieces"), [("batched", 2), ("one_by_one", 1), ("one_by_one", 2)])
def test_a_step_is_the_same_in_pieces_and_copy_by_copy(
    whole_step: tuple[dict[str, Tensor], dict[str, Tensor]], recollection: str, pieces: int
) -> None:
    losses, gradients = made_step(recollection, pieces)
    expected_losses, expected = whole_step
    assert losses.keys() == expected_losses.keys()
    for name, value in losses.items():
        assert float(value) == pytest.approx(float(expected_losses[name]), rel=1e-4), name
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-3 * scale, msg=name)


def test_copies_one_by_one_keep_nothing_of_a_stage() -> None:
    """Between forward and backward: what autograd keeps of a stage, beside the parameters."""
    detector = random_detector(small_config(stages=4, train_batch_statistics=False)).train()
    batch = Batch(torch.randn(2, 3, 64, 96), torch.full((2, 2), 64.0), [])
    kept = {}
    for recollection in ("none", "one_by_one", "batched"):
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = training_outputs(detector, batch, Step(0), recollection)
        kept[recollection] = sum(sizes.values())
        del outputs
    assert kept["one_by_one"] < kept["none"] < 0.6 * kept["batched"]


def test_a_batch_without_objects_has_a_finite_loss_of_classes_alone() -> None:
    detector = random_detector()
    training = AdaMixerTraining(detector, AdaMixerSettings("batched"))
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    batch = Batch(torch.randn(2, 3, 64, 64), torch.full((2, 2), 64.0), [nothing, nothing])
    outputs = training.outputs(batch, Step(0))
    losses = training.losses(outputs, batch.targets, training.counts(batch, Step(0)).clamp(min=1))
    assert set(losses) == set(training.weights) == set(training.parts)
    for name, value in losses.items():
        assert value.isfinite()
        assert bool(value > 0) == name.startswith("loss_class")


def test_settings_and_recipes() -> None:
    with pytest.raises(ValueError, match="recollection is 'sqr'; choose one of none, one_by_one, batched"):
        AdaMixerSettings("sqr")
    for name in PRESETS:
        config = TrainConfig.for_preset(name, ".", ".")
        assert config.settings.recollection == ("batched" if name.startswith("sqr") else "none")
    short, long = (TrainConfig.for_preset(name, ".", ".") for name in ("adamixer-r50-1x-100", "adamixer-r50-3x-300"))
    assert (short.epochs, short.milestones, short.crop_probability) == (12, (8, 11), 0)
    assert (long.epochs, long.milestones, long.crop_probability) == (36, (24, 33), 0.5)
    assert long.training_shorter_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert {config.learning_rate for config in (short, long)} == {
        config.backbone_learning_rate for config in (short, long)
    }
