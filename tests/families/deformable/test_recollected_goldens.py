"""MMDetection's Deformable DETR, plain and trained with recollection, against numbers of the published code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from asag.families.deformable.detector import DeformableDetector
from asag.families.deformable.published import PublishedDeformable
from asag.families.deformable.training.forward import training_outputs
from asag.families.deformable.training.settings import DeformableSettings
from asag.families.deformable.training.training import DeformableTraining
from asag.parts.boxes import content_scale, xyxy_to_cxcywh
from asag.parts.levels import levels_of
from asag.training.assignment import Matches, assign, pad_targets
from asag.training.protocol import Batch, Step, Target
from asag.training.recollection import StagePredictions
from asag.training.set_losses import LOSSES, WEIGHTS, copy_losses, matching_costs
from tests.families.deformable.golden_cases import RECOLLECTED, golden_batch, golden_detector, names
from tests.families.deformable.test_deformable_goldens import check_detections
from tests.golden_files import read_case

LOGIT_TOLERANCE = 1e-4
BOX_TOLERANCE = 5e-6
"""Fractions of the content."""
VALUE_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 3e-3
"""Both relative."""


@torch.no_grad()
def seen_values(detector: DeformableDetector, images: Tensor, sizes: Tensor) -> tuple[dict[str, Any], Any, Any]:
    """Maps and the tokens after the first and the last layer of the encoder by the names of the case."""
    found: dict[str, Any] = {}

    def leave_backbone(_: Any, __: Any, maps: list[Tensor]) -> None:
        found.update({f"c{level}": value for level, value in enumerate(maps[-3:], start=3)})

    def leave_neck(_: Any, __: Any, maps: list[Tensor]) -> None:
        found.update({f"p{level}": value for level, value in enumerate(maps, start=3)})

    def leave_encoder(_: Any, __: Any, made: tuple[Tensor, list[Tensor]]) -> None:
        found.update(encoder0=made[1][0], encoder=made[0])

    hooks = ((detector.backbone, leave_backbone), (detector.neck, leave_neck), (detector.encoder, leave_encoder))
    handles = [part.register_forward_hook(hook) for part, hook in hooks]
    outputs = training_outputs(detector, Batch(images, sizes, []), Step(0), "none")
    for handle in handles:
        handle.remove()
    levels = levels_of([found[f"p{level}"] for level in (3, 4, 5, 6)], sizes, images)
    position = levels.maps(levels.embedding(torch.zeros_like(detector.level_embedding)))
    found |= {f"p{level}_position": value for level, value in enumerate(position, start=3)}
    return {name: value.detach().numpy() for name, value in found.items()}, outputs, levels


def sampled(value: NDArray) -> NDArray:
    """Of a map [B, C, h, w] every quarter of the channels and sixth of the sides."""
    channels, height, width = value.shape[1:]
    return value[:, :: channels // 4, :: -(-height // 6), :: -(-width // 6)]


@pytest.mark.parametrize("name", names(RECOLLECTED, "deformable_"))
def test_every_section(goldens: Path, name: str) -> None:
    case, meta = read_case(RECOLLECTED, name)
    images, sizes = golden_batch(meta)
    detector = golden_detector(RECOLLECTED, meta)
    found, outputs, levels = seen_values(detector, images, sizes)

    def compare(key: str, ours: NDArray, tolerance: float = VALUE_TOLERANCE, where: Any = slice(None)) -> None:
        np.testing.assert_allclose(ours[where], case[key][where], rtol=1e-5, atol=tolerance, err_msg=key)

    for key in ("c3", "c4", "c5", "p3", "p4", "p5", "p6"):
        compare(f"{key}_sample", sampled(found[key]))
        compare(f"{key}_mean", found[key].mean((1, 2, 3)))
        compare(f"{key}_std", found[key].std((1, 2, 3)))
    # Nobody sees what is computed for the cells of the padding, and the reference places them elsewhere.
    content = (~levels.padded).numpy()
    for key, map_ in zip(("p3", "p4", "p5", "p6"), levels.maps(~levels.padded.unsqueeze(-1)), strict=True):
        where = sampled(map_.expand(-1, 256, -1, -1).numpy())
        compare(f"{key}_position_sample", sampled(found[f"{key}_position"]), where=where)
    for key in ("encoder0", "encoder"):
        compare(f"{key}_sample", found[key][:, ::37, ::32], where=content[:, ::37])
    if content.all():
        compare("encoder_mean", found["encoder"].mean((1, 2)))
        compare("encoder_std", found["encoder"].std((1, 2)))
    references = detector.learned_queries(len(images)).references.detach().numpy()
    compare("reference_points", references, BOX_TOLERANCE)
    for number, said in enumerate(outputs.decoder):
        step = 10 if number < 5 else 1
        compare(f"layer{number}_logits", said.logits[0].numpy()[..., ::step], LOGIT_TOLERANCE)
        compare(f"layer{number}_boxes", said.boxes[0].numpy(), BOX_TOLERANCE)
    detections = {part: [case[f"image{image}_{part}"] for image in range(len(images))] for part in PARTS}
    check_detections(detector, images, sizes, {f"det_{part}": value for part, value in detections.items()})  # type: ignore[dict-item]


PARTS = ("boxes", "scores", "labels")


def corner_targets(case: dict[str, NDArray], sizes: Tensor) -> list[Target]:
    """Targets whose boxes are corners in pixels."""
    found = []
    for image in range(len(sizes)):
        corners = torch.from_numpy(case[f"target{image}_boxes"]).float().reshape(1, -1, 4)
        boxes = (xyxy_to_cxcywh(corners) / content_scale(sizes[image : image + 1]))[0]
        found.append({"boxes": boxes, "labels": torch.from_numpy(case[f"target{image}_labels"]).long()})
    return found


def check_matches(case: dict[str, NDArray], prefix: str, pairs: Matches, images: int, copy: int) -> None:
    """For each target its query is the reference's; -1 where it has none."""
    for image in range(images):
        wanted = case[f"{prefix}_image{image}_matched"]
        own = pairs.group == copy * images + image
        ours = np.full(len(wanted), -1)
        ours[pairs.target[own].numpy()] = pairs.query[own].numpy()
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("name", names(RECOLLECTED, "criterion_deformable"))
def test_losses_and_their_gradients(goldens: Path, name: str) -> None:
    case, meta = read_case(RECOLLECTED, name)
    targets = corner_targets(case, torch.from_numpy(case["image_sizes_hw"]).float())
    objects = pad_targets(targets, torch.device("cpu"))
    copies = range(len(meta["losses"]))
    logits = [torch.from_numpy(case[f"copy{copy}_logits"]).requires_grad_() for copy in copies]
    boxes = [torch.from_numpy(case[f"copy{copy}_boxes"]).requires_grad_() for copy in copies]
    found = StagePredictions(torch.stack(logits), torch.stack(boxes))
    (pairs,) = assign([matching_costs(found, objects)])
    divisor = max(1, sum(len(target["labels"]) for target in targets))
    losses = copy_losses(found, objects, pairs) * torch.tensor(WEIGHTS).unsqueeze(1) / divisor
    expected = torch.tensor([[entry[kind] for entry in meta["losses"]] for kind in ("class", "l1", "giou")])
    torch.testing.assert_close(losses.detach(), expected, rtol=LOSS_TOLERANCE, atol=0)
    losses.sum().backward()
    for copy in copies:
        check_matches(case, f"copy{copy}", pairs, len(targets), copy)
        of_logits, of_boxes = logits[copy].grad, boxes[copy].grad
        assert of_logits is not None
        assert float(of_logits.norm()) == pytest.approx(float(case[f"copy{copy}_gradient_logits_norm"]), rel=1e-4)
        wanted = case[f"copy{copy}_gradient_boxes"]
        assert of_boxes is not None
        np.testing.assert_allclose(of_boxes, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(initial=1e-9))


@pytest.mark.parametrize("recollection", ["one_by_one", "batched"])
def test_a_training_step(goldens: Path, recollection: str) -> None:
    case, meta = read_case(RECOLLECTED, "train_deformable")
    images, sizes = golden_batch(meta)
    targets = corner_targets(case, sizes)
    detector = golden_detector(RECOLLECTED, meta).train()
    detector.backbone.freeze()
    training = DeformableTraining(detector, DeformableSettings(recollection))
    batch = Batch(images, sizes, targets)
    outputs = training.outputs(batch, Step(0))
    matches = assign([matching_costs(found, pad_targets(targets, images.device)) for found in outputs.decoder])
    for stage, (found, pairs) in enumerate(zip(outputs.decoder, matches, strict=True)):
        entries = [entry for entry in meta["losses"] if entry["stage"] == stage]
        assert len(entries) == len(found.logits)
        for copy in range(len(entries)):
            prefix = f"stage{stage}_copy{copy}"
            logits, boxes = found.logits[copy].detach()[..., ::10], found.boxes[copy].detach()
            np.testing.assert_allclose(logits, case[f"{prefix}_logits"], rtol=0, atol=LOGIT_TOLERANCE)
            np.testing.assert_allclose(boxes, case[f"{prefix}_boxes"], rtol=0, atol=BOX_TOLERANCE)
            check_matches(case, prefix, pairs, len(targets), copy)
    losses = training.losses(outputs, targets, training.counts(batch, Step(0)))
    for stage in range(len(outputs.decoder)):
        entries = [entry for entry in meta["losses"] if entry["stage"] == stage]
        for kind, loss in zip(("class", "l1", "giou"), LOSSES, strict=True):
            ours = float(losses[f"{loss}_{stage}"].detach()) * training.weights[f"{loss}_{stage}"]
            assert ours == pytest.approx(sum(entry[kind] for entry in entries), rel=LOSS_TOLERANCE)
    total = torch.stack([value * training.weights[name] for name, value in losses.items()]).sum()
    assert float(total.detach()) == pytest.approx(meta["total"], rel=LOSS_TOLERANCE)
    total.backward()
    check_gradients(detector, meta["gradient_norms"])


def check_gradients(detector: DeformableDetector, expected: dict[str, float]) -> None:
    """Norms of published tensors, some of which are several of ours: relative to themselves or to a ten-thousandth of
    the largest. No other parameter trains.
    """
    found = {name: each.grad.norm() for name, each in detector.named_parameters() if each.grad is not None}
    published, least = PublishedDeformable(), max(expected.values()) * 1e-4
    seen = set()
    for name, norm in expected.items():
        parts = [ours for ours, _ in published.translate(name, torch.zeros(3), detector.config) or ()]
        assert parts, name
        ours = float(torch.stack([found[part] for part in parts]).norm())
        assert abs(ours - norm) / max(norm, least) < GRADIENT_TOLERANCE, name
        seen.update(parts)
    assert seen == set(found)
