import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from train.anchor_targets import flip_boxes, patch_groups, quarter_groups
from train.criterion import BatchTotals
from train.matching import pad_targets
from train.query_weighting import pair_weights, weighting_curve

from train import DetectionCriterion

CLASSES = 5
Outputs = dict[str, Any]
Targets = list[dict[str, Tensor]]
GOLDEN_CASES = ("two_images", "one_empty", "denoising")


def random_boxes(*shape: int, generator: torch.Generator) -> Tensor:
    size = torch.rand(*shape, 2, generator=generator) * 0.4 + 0.02
    centre = size / 2 + torch.rand(*shape, 2, generator=generator) * (1 - size)
    return torch.cat([centre, size], -1)


def random_case(
    counts: Sequence[int], seed: int = 0, queries: int = 12, probed: bool = True, noised: int = 0
) -> tuple[Outputs, Targets]:
    generator = torch.Generator().manual_seed(seed)
    images = len(counts)

    def anchors(*shape: int) -> Tensor:
        logits = torch.randn(*shape, 1, generator=generator)
        return torch.cat([random_boxes(*shape, generator=generator), logits], -1).requires_grad_()

    outputs: Outputs = {
        "image_sizes_hw": torch.tensor([[256, 320], [240, 272]] * images)[:images],
        "p6_anchors": anchors(images, 4, 6),
        "p5_anchors": anchors(images, 4, 6),
        "valid": torch.arange(queries) < torch.randint(queries // 2, queries + 1, (images, 1), generator=generator),
    }
    if noised:
        outputs["denoising_queries"] = noised
    for stage in ("proposal", "aux_0", "aux_1", "aux_2", "main"):
        total = noised + queries
        outputs[f"{stage}_logits"] = torch.randn(images, total, CLASSES, generator=generator).requires_grad_()
        outputs[f"{stage}_boxes"] = random_boxes(images, total, generator=generator).requires_grad_()
    for level, patches in (("p4", 3), ("p3", 4)) if probed else ():
        index = torch.arange(images).repeat_interleave(patches)
        outputs[f"{level}_anchors"] = anchors(len(index), 4)
        outputs[f"{level}_crop_xy"] = torch.randint(0, 6, (len(index), 2), generator=generator)
        outputs[f"{level}_image_index"] = index
    targets = [
        {
            "boxes": random_boxes(count, generator=generator),
            "labels": torch.randint(0, CLASSES, (count,), generator=generator),
        }
        for count in counts
    ]
    return outputs, targets


def part_of_case(outputs: Outputs, targets: Targets, images: slice) -> tuple[Outputs, Targets]:
    chosen = torch.arange(len(targets))[images]
    part: Outputs = {}
    for name, value in outputs.items():
        level = name.split("_")[0]
        if level in ("p4", "p3"):
            index = outputs[f"{level}_image_index"]
            kept = value[torch.isin(index, chosen)]
            part[name] = kept - chosen[0] if name.endswith("image_index") else kept
        else:
            part[name] = value[images] if isinstance(value, Tensor) else value
    return part, targets[images]


def assert_losses_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=2e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


def golden_case(path: Path) -> tuple[Outputs, Targets, dict[str, Any]]:
    with np.load(path, allow_pickle=False) as archive:
        meta = json.loads(str(archive["meta"]))
        arrays = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "meta"}
    targets = [
        {"boxes": arrays.pop(f"target{image}_boxes"), "labels": arrays.pop(f"target{image}_labels")}
        for image in range(len(arrays["valid"]))
    ]
    return {**arrays, "denoising_queries": meta["denoising_queries"]}, targets, meta


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_every_golden_loss_and_the_total(goldens: Path, case: str) -> None:
    outputs, targets, meta = golden_case(goldens / f"criterion_{case}.npz")
    criterion = DetectionCriterion(80)
    losses = criterion(outputs, targets)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(meta["losses"], rel=2e-6)
    assert {name: criterion.weights[name] for name in losses} == meta["weights"]
    assert criterion.total(losses).item() == pytest.approx(meta["total"], rel=2e-6)
    assert criterion.statistics["iou_anchor"].item() == pytest.approx(meta["extras"]["iou_anchor"], rel=2e-6)


def test_the_order_of_queries_objects_and_patches_does_not_matter() -> None:
    outputs, targets = random_case((4, 3))
    criterion = DetectionCriterion(CLASSES)
    expected = criterion(outputs, targets)
    generator = torch.Generator().manual_seed(9)
    order = torch.randperm(12, generator=generator)
    shuffled = dict(outputs)
    for name, value in outputs.items():
        if name == "valid" or name.startswith(("proposal", "aux", "main")):
            shuffled[name] = value[:, order]
    patches = torch.randperm(len(outputs["p4_image_index"]), generator=generator)
    for name in ("p4_anchors", "p4_crop_xy", "p4_image_index"):
        shuffled[name] = outputs[name][patches]
    turned = [{name: value.flip(0) for name, value in target.items()} for target in targets]
    assert_losses_close(criterion(shuffled, turned), expected)


@pytest.mark.parametrize("counts", [(0, 0), (0, 3)])
@pytest.mark.parametrize("noised", [0, 10])
def test_images_without_objects_give_finite_losses_and_gradients(counts: tuple[int, ...], noised: int) -> None:
    outputs, targets = random_case(counts, noised=noised)
    criterion = DetectionCriterion(CLASSES)
    losses = criterion(outputs, targets)
    criterion.total(losses).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, value in outputs.items():
        if isinstance(value, Tensor) and value.requires_grad:
            assert value.grad is not None, name
            assert value.grad.isfinite().all(), name
    if sum(counts) == 0:
        assert losses["loss_bbox"] == losses["loss_giou_anchor"] == 0
        assert losses["loss_ce"] > 0


def test_padding_queries_get_no_gradient_and_do_not_count() -> None:
    outputs, targets = random_case((3, 2))
    criterion = DetectionCriterion(CLASSES)
    expected = criterion(outputs, targets)
    padding = ~outputs["valid"]
    changed = {**outputs, "main_logits": outputs["main_logits"].masked_fill(padding[..., None], 8.0)}
    assert_losses_close(criterion(changed, targets), expected)
    criterion.total(expected).backward()
    assert outputs["main_logits"].grad[padding].abs().max() == 0
    assert outputs["main_boxes"].grad[padding].abs().max() == 0


def test_halves_of_a_batch_add_up_under_the_whole_batchs_totals() -> None:
    outputs, targets = random_case((4, 0, 2, 3))
    criterion = DetectionCriterion(CLASSES)
    whole = criterion(outputs, targets)
    totals = BatchTotals(objects=9, patches=28)
    first = criterion(*part_of_case(outputs, targets, slice(0, 2)), totals)
    second = criterion(*part_of_case(outputs, targets, slice(2, 4)), totals)
    assert_losses_close({name: first[name] + second[name] for name in whole}, whole)


def test_levels_and_patches_may_be_missing() -> None:
    criterion = DetectionCriterion(CLASSES)
    outputs, targets = random_case((3, 2), probed=False)
    without = criterion(outputs, targets)
    empty = {
        f"{level}_{name}": value
        for level in ("p4", "p3")
        for name, value in (
            ("anchors", torch.empty(0, 4, 5)),
            ("crop_xy", torch.empty(0, 2, dtype=torch.int64)),
            ("image_index", torch.empty(0, dtype=torch.int64)),
        )
    }
    assert_losses_close(criterion({**outputs, **empty}, targets), without)


@pytest.mark.parametrize(("view", "order"), [(1, [1, 0, 3, 2]), (2, [2, 3, 0, 1]), (3, [3, 2, 1, 0])])
def test_mirroring_the_objects_exchanges_the_views_of_the_coarse_patch(view: int, order: list[int]) -> None:
    outputs, targets = random_case((3, 4), probed=False)
    del outputs["p5_anchors"]
    criterion = DetectionCriterion(CLASSES)
    expected = criterion(outputs, targets)
    mirrored = [{**target, "boxes": flip_boxes(target["boxes"])[view]} for target in targets]
    found = criterion({**outputs, "p6_anchors": outputs["p6_anchors"][:, order]}, mirrored)
    for name in ("loss_ce_anchor", "loss_bbox_anchor", "loss_giou_anchor"):
        torch.testing.assert_close(found[name], expected[name])


def test_losses_teach_a_free_prediction_its_objects() -> None:
    outputs, targets = random_case((2, 3), probed=False)
    criterion = DetectionCriterion(CLASSES)
    leaves = [value for value in outputs.values() if isinstance(value, Tensor) and value.requires_grad]
    optimizer = torch.optim.Adam(leaves, lr=0.02)
    history = []
    for _ in range(150):
        losses = criterion(outputs, targets)
        optimizer.zero_grad()
        criterion.total(losses).backward()
        optimizer.step()
        history.append(losses)
    for name in ("loss_ce", "loss_bbox", "loss_giou", "loss_ce_rpn", "loss_ce_anchor", "loss_bbox_anchor"):
        assert history[-1][name] < 0.3 * history[0][name], name
    assert criterion.statistics["iou_anchor"] > 0.8


def test_neighbouring_quarters_share_no_object() -> None:
    generator = torch.Generator().manual_seed(3)
    boxes = torch.cat([random_boxes(40, generator=generator), torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.1, 1, 0.1]])])
    images = pad_targets([{"boxes": boxes, "labels": torch.zeros(42, dtype=torch.int64)}], boxes.device)
    quarters = quarter_groups(images)
    assert quarters.valid.sum(0).tolist() == [1] * 42
    assert quarters.valid[3, 40]
    assert quarters.valid[1, 41]
    owned = quarters.boxes[quarters.valid]
    assert (owned[:, :2] - owned[:, 2:] / 2 >= -1e-6).all()
    assert (owned[:, :2] + owned[:, 2:] / 2 <= 1 + 1e-6).all()
    torch.testing.assert_close(quarters.boxes[3, 40], torch.tensor([0.1, 0.1, 0.2, 0.2]))


def test_a_patch_owns_the_small_objects_centred_in_it_in_its_own_coordinates() -> None:
    pixels = torch.tensor([[100.0, 90.0, 24.0, 48.0], [100.0, 90.0, 241.0, 20.0], [290.0, 90.0, 30.0, 30.0]])
    sizes = torch.tensor([[200, 400]])
    images = pad_targets(
        [{"boxes": pixels / torch.tensor([400, 200, 400, 200]), "labels": torch.zeros(3, dtype=torch.int64)}],
        pixels.device,
    )
    corners, index = torch.tensor([[2, 1], [2, 1]]), torch.tensor([0, 0])
    groups = patch_groups(images, sizes, corners, index, strides=torch.tensor([16, 8]))
    assert groups.valid.tolist() == [[True, False, False], [True, False, False]]
    torch.testing.assert_close(groups.boxes[0, 0], torch.tensor([68 / 240, 74 / 240, 24 / 240, 48 / 240]))
    torch.testing.assert_close(groups.boxes[1, 0], torch.tensor([84 / 120, 82 / 120, 24 / 120, 48 / 120]))
    cut = patch_groups(images, sizes, torch.tensor([[12, 0]]), torch.tensor([0]), strides=torch.tensor([8]))
    torch.testing.assert_close(cut.boxes[0, 0], torch.tensor([8 / 120, 90 / 120, 16 / 120, 48 / 120]))


def test_query_weights_meet_the_formula() -> None:
    one, zero = torch.ones(1), torch.zeros(1)
    assert weighting_curve(one).item() == pytest.approx(1.0)
    positive, negative = pair_weights(one, one)
    assert (positive.item(), negative.item()) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-6))
    positive, negative = pair_weights(one, zero)
    floor = 1 / (1 + math.exp(1.5)) * (1 + math.exp(-3))
    assert (positive.item(), negative.item()) == (pytest.approx(floor), pytest.approx(1 - floor))
    score, iou = torch.tensor(0.7), torch.tensor(0.6)
    quality = 0.6**0.6
    doubt = (quality**2 - 1) / (0.25 - 1) * 0.7**0.4
    curve = lambda x: (1 + math.exp(-3)) / (1 + math.exp(-4.5 * (x - 1 / 3)))  # noqa: E731
    positive, negative = pair_weights(score, iou)
    assert positive.item() == pytest.approx(curve(0.7**0.4 * quality), rel=1e-5)
    assert negative.item() == pytest.approx(curve(doubt) - curve(0), rel=1e-5)


@pytest.mark.parametrize("broken", ["classes", "images", "queries"])
def test_shapes_that_disagree_are_refused(broken: str) -> None:
    outputs, targets = random_case((2, 1))
    criterion = DetectionCriterion(CLASSES + (broken == "classes"))
    if broken == "images":
        targets = targets[:1]
    if broken == "queries":
        outputs["denoising_queries"] = 3
    with pytest.raises(ValueError, match="proposal_logits"):
        criterion(outputs, targets)


def test_predictions_that_are_not_numbers_are_named() -> None:
    outputs, targets = random_case((2, 1))
    outputs["main_logits"] = outputs["main_logits"] * torch.nan
    with pytest.raises(ValueError, match="not numbers"):
        DetectionCriterion(CLASSES)(outputs, targets)
