"""The losses of the anchors, the proposals, the heads and the noised queries (README, section 7)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from asag.families.asag.anchors import LEVEL_STRIDES
from asag.families.asag.config import HEADS
from asag.families.asag.training.anchor_targets import flip_groups, patch_groups, quarter_groups
from asag.families.asag.training.denoising import repetition_matches
from asag.families.asag.training.forward import PROPOSALS, TrainingAnchors, TrainingOutputs
from asag.families.asag.training.matching import TargetGroups, matching_costs
from asag.families.asag.training.query_weighting import GroupLosses, anchor_losses, query_losses
from asag.training.assignment import Matches, assign, pad_targets
from asag.training.protocol import Target
from asag.training.timing import PartTimer

_Value = TypeVar("_Value")

STAGES = (PROPOSALS, *HEADS)
"""Every stage that predicts objects, in the order of the noised queries' losses."""
SUFFIXES = {PROPOSALS: "_rpn", "aux_0": "_0", "aux_1": "_1", "aux_2": "_2", "main": ""}
"""How the names of a stage's losses end."""
LOSSES = ("loss_ce", "loss_bbox", "loss_giou")
QUERY_WEIGHTS = (2.0, 5.0, 2.0)
ANCHOR_WEIGHTS = (8.0, 4.0, 2.0)
FIXED_PATCHES = 4
"""The probed patches of a batch together weigh as many fixed patches as one image has."""


def _named(values: Iterable[_Value], prefix: str = "", suffix: str = "") -> dict[str, _Value]:
    return {f"{prefix}{name}{suffix}": value for name, value in zip(LOSSES, values, strict=True)}


def _noised(values: Iterable[_Value], stage: str) -> dict[str, _Value]:
    return _named(values, "dn_", f"_{STAGES.index(stage)}")


def _weights_and_parts() -> tuple[dict[str, float], dict[str, str]]:
    """Of every loss that can occur: its weight, and the part that it belongs to."""
    weights = _named(ANCHOR_WEIGHTS, suffix="_anchor")
    parts = dict.fromkeys(weights, "anchors")
    for stage in STAGES:
        ordinary, noised = _named(QUERY_WEIGHTS, suffix=SUFFIXES[stage]), _noised(QUERY_WEIGHTS, stage)
        weights |= ordinary | noised
        parts |= dict.fromkeys(ordinary, "proposals" if stage == PROPOSALS else "heads")
        parts |= dict.fromkeys(noised, "denoising")
    return weights, parts


WEIGHTS, PARTS = _weights_and_parts()


@dataclass(frozen=True)
class AnchorTerm:
    """One of the anchor loss's terms: G patches and what they own."""

    logits: Tensor
    """[G, k] confidence before the sigmoid."""
    boxes: Tensor
    """[G, k, 4] `cxcywh`, fractions of the patch."""
    groups: TargetGroups
    probed: bool = False


def detection_losses(
    outputs: TrainingOutputs, targets: Sequence[Target], totals: Tensor, timer: PartTimer
) -> dict[str, Tensor]:
    """Unweighted scalar losses; :data:`WEIGHTS` has every name that can occur.

    totals: [3] float32 objects, patches of P4 and P3, and images of the whole step; at least 1 each. Names end in
    nothing for the main head, `_0`.. for the auxiliary ones, `_rpn` for the proposals and `_anchor` for the anchors;
    those of the noised queries are `dn_*_0` for the proposals and `dn_*_1`.. for the heads. Raises ValueError where
    outputs and targets are of other images.
    """
    object_count, patch_count, image_count = totals.unbind(0)
    logits = torch.stack([outputs.stages[stage].logits for stage in STAGES]).float()
    boxes = torch.stack([outputs.stages[stage].boxes for stage in STAGES]).float()
    noised = outputs.noised
    expected = (len(STAGES), len(targets), noised + outputs.anchors.valid.shape[1])
    if logits.shape[:3] != expected:
        raise ValueError(f"the logits are {tuple(logits.shape)}; stages, images and queries ask for {expected}")
    images = TargetGroups.of_images(pad_targets(targets, logits.device))
    terms = anchor_terms(outputs.anchors, images, outputs.sizes)

    # Stages times images are groups alike, so that all of them are costed, assigned and summed at once.
    objects = images.repeat(len(STAGES))
    query_logits, query_boxes = logits[:, :, noised:].flatten(0, 1), boxes[:, :, noised:].flatten(0, 1)
    valid = outputs.anchors.valid.repeat(len(STAGES), 1)
    with timer.part("assignment"):
        costs = [matching_costs(query_logits, query_boxes, valid, objects)[0]]
        overlaps = []
        for term in terms:
            cost, iou = matching_costs(term.logits[..., None], term.boxes, None, term.groups)
            costs.append(cost)
            overlaps.append(iou)
        matches, *anchor_matches = assign(costs)

    found = _sum_images(query_losses(query_logits, query_boxes, valid, objects, matches), len(STAGES))
    losses: dict[str, Tensor] = {}
    for stage, values in zip(STAGES, (found / object_count).unbind(1), strict=True):
        losses |= _named(values, suffix=SUFFIXES[stage])
    sums = _anchor_sums(terms, overlaps, anchor_matches, patch_count)
    losses |= _named(sums / object_count, suffix="_anchor")
    if noised:
        found = _noised_sums(logits[:, :, :noised], boxes[:, :, :noised], targets, objects)
        for stage, values in zip(STAGES, (found / (noised * image_count)).unbind(1), strict=True):
            losses |= _noised(values, stage)
    return losses


def anchor_terms(anchors: TrainingAnchors, images: TargetGroups, sizes: Tensor) -> list[AnchorTerm]:
    """The terms of P6, of P5, and of all probed levels together; sizes: [B, 2] (height, width) in pixels."""
    terms = []
    for fixed, groups_of in ((anchors.p6, flip_groups), (anchors.p5, quarter_groups)):
        flat = fixed.float().flatten(0, 1)
        terms.append(AnchorTerm(flat[..., 4], flat[..., :4], groups_of(images)))
    if anchors.probed:
        levels = anchors.probed.values()
        flat = torch.cat([level.anchors.float() for level in levels])
        corners = torch.cat([level.corners for level in levels])
        image_index = torch.cat([level.image_index for level in levels])
        strides = [torch.full_like(level.image_index, LEVEL_STRIDES[name]) for name, level in anchors.probed.items()]
        groups = patch_groups(images, sizes, corners, image_index, torch.cat(strides))
        terms.append(AnchorTerm(flat[..., 4], flat[..., :4], groups, probed=True))
    return terms


def _anchor_sums(
    terms: Sequence[AnchorTerm], overlaps: Sequence[Tensor], matches: Sequence[Matches], patch_count: Tensor
) -> Tensor:
    """Class, L1 and GIoU loss of the anchors, [3]."""
    sums = torch.zeros(len(LOSSES), device=patch_count.device)
    for term, overlap, pairs in zip(terms, overlaps, matches, strict=True):
        found = anchor_losses(term.logits, term.boxes, overlap, term.groups, pairs)
        scale = FIXED_PATCHES / patch_count if term.probed else 1.0
        sums = sums + _sum_images(found, 1)[:, 0] * scale
    return sums


def _noised_sums(logits: Tensor, boxes: Tensor, targets: Sequence[Target], objects: TargetGroups) -> Tensor:
    """Losses [3, stages] of the noised queries: logits [stages, B, D, C], boxes [stages, B, D, 4]."""
    counts = [len(target["boxes"]) for target in targets] * len(STAGES)
    valid, matches = repetition_matches(counts, logits.shape[2], logits.device)
    return _sum_images(query_losses(logits.flatten(0, 1), boxes.flatten(0, 1), valid, objects, matches), len(STAGES))


def _sum_images(found: GroupLosses, stages: int) -> Tensor:
    """Class, L1 and GIoU loss of each stage [3, stages], from groups that are stage-major."""
    return torch.stack([found.classification, found.l1, found.giou]).unflatten(1, (stages, -1)).sum(-1)
