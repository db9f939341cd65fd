"""The training loss of the detector (specification section 7, "Losses")."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from asag.families.asag.training.anchor_targets import flip_groups, patch_groups, quarter_groups
from asag.families.asag.training.denoising import repetition_matches
from asag.families.asag.training.query_weighting import GroupLosses, anchor_losses, query_losses
from asag.training.matching import Matches, TargetGroups, assign, matching_costs, pad_targets
from asag.training.timing import PartTimer
from asag.training.transfer import to_device

_Value = TypeVar("_Value")

STAGES = {"proposal": "_rpn", "aux_0": "_0", "aux_1": "_1", "aux_2": "_2", "main": ""}
"""Every stage that predicts objects, in the order of the noised queries' losses, and its losses' suffix."""
LOSSES = ("loss_ce", "loss_bbox", "loss_giou")
WEIGHTS = (2.0, 5.0, 2.0)
ANCHOR_WEIGHTS = (8.0, 4.0, 2.0)
FIXED_PATCHES = 4
"""The probed patches of a batch together weigh as many fixed patches as one image has."""
STRIDES = {"p4": 16, "p3": 8}


@dataclass(frozen=True)
class BatchTotals:
    """What the losses of one optimizer step are divided by.

    ``objects``: the objects of the step's whole batch over all processes (at least 1), over the number of processes.
    ``patches``: the P4 and P3 patches of the step's whole batch over all processes, at least 1.
    ``images``: its images over all processes, over the number of processes; None takes those of the call.
    """

    objects: Tensor | float
    patches: Tensor | float
    images: Tensor | float | None = None


def count_totals(objects: int, patches: int, device: torch.device, images: int = 1) -> BatchTotals:
    """Totals from this process's counts, added up over the processes where ``torch.distributed`` is initialized."""
    counts = to_device(torch.tensor([objects, patches, images], dtype=torch.float32), device)
    processes = 1
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(counts)
        processes = distributed.get_world_size()
    counts = counts.clamp(min=1)
    return BatchTotals(counts[0] / processes, counts[1], counts[2] / processes)


@dataclass(frozen=True)
class _AnchorTerm:
    """One of the anchor loss's terms: logits [G, k] and boxes [G, k, 4] of G patches, and what the patches own."""

    logits: Tensor
    boxes: Tensor
    groups: TargetGroups
    probed: bool = False


class DetectionCriterion(nn.Module):
    """Losses of the anchors, the proposals, the heads and the noised queries.

    Called with the detector's training outputs (named as `Detector.stages` names them) and one target per image::

        p6_anchors  [B, 4, k, 5]   four flips; box (cxcywh, fractions of the patch), confidence before the sigmoid
        p5_anchors  [B, 4, k, 5]   four quarters
        p4_anchors  [N, k, 5]      probed patches, with p4_crop_xy [N, 2] (cells) and p4_image_index [N]; same p3_*
        valid       [B, Q]         which queries are real
        proposal_logits [B, D+Q, C], proposal_boxes [B, D+Q, 4] (cxcywh, fractions of the content)
        aux_0_logits, aux_0_boxes, .., main_logits, main_boxes   likewise
        image_sizes_hw [B, 2]      (height, width) of the contents in pixels
        denoising_queries          D, the noised queries that come first (0 when absent)

    and ``targets``: per image ``boxes`` [n, 4] (``cxcywh``, fractions of the content) and ``labels`` [n] int64.
    A level or a head that is absent is left out. Returns unweighted scalar losses by name; ``weights`` holds the weight
    of every name that can occur, ``total`` adds them up. Suffixes: none for ``main``, ``_0``.. for ``aux_0``..,
    ``_rpn`` for the proposals, ``_anchor`` for the anchors; ``dn_*_0`` for the noised queries' proposals and
    ``dn_*_1``.. for the heads. ``statistics`` keeps the last call's mean IoU of matched anchors (``iou_anchor``).
    """

    def __init__(self, num_classes: int = 80) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.timer = PartTimer(enabled=False)
        self.statistics: dict[str, Tensor] = {}
        self.weights = _named(ANCHOR_WEIGHTS, "", "_anchor")
        for position, suffix in enumerate(STAGES.values()):
            self.weights |= _named(WEIGHTS, "", suffix) | _named(WEIGHTS, "dn_", f"_{position}")

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the losses, a scalar."""
        return torch.stack([loss * self.weights[name] for name, loss in losses.items()]).sum()

    def forward(
        self,
        outputs: Mapping[str, Any],
        targets: Sequence[Mapping[str, Tensor]],
        totals: BatchTotals | None = None,
    ) -> dict[str, Tensor]:
        """Unweighted losses by name. ``totals`` replaces this call's own counts, for a step made of several calls."""
        stages = [stage for stage in STAGES if f"{stage}_logits" in outputs]
        noised = int(outputs.get("denoising_queries", 0))
        self._check(outputs, targets, stages, noised)
        logits = torch.stack([outputs[f"{stage}_logits"].float() for stage in stages])
        boxes = torch.stack([outputs[f"{stage}_boxes"].float() for stage in stages])
        images = pad_targets(targets, logits.device)
        terms = _anchor_terms(outputs, images)
        if totals is None:
            patches = sum(term.logits.shape[0] for term in terms if term.probed)
            counted = sum(len(target["boxes"]) for target in targets)
            totals = count_totals(counted, patches, logits.device, len(targets))

        # Stages times images are groups alike, so that all of them are costed, assigned and summed at once.
        objects = images.repeat(len(stages))
        query_logits, query_boxes = logits[:, :, noised:].flatten(0, 1), boxes[:, :, noised:].flatten(0, 1)
        valid = outputs["valid"].repeat(len(stages), 1)
        with self.timer.part("assignment"):
            costs = [matching_costs(query_logits, query_boxes, valid, objects)[0]]
            overlaps = []
            for term in terms:
                cost, iou = matching_costs(term.logits[..., None], term.boxes, None, term.groups)
                costs.append(cost)
                overlaps.append(iou)
            matches, *anchor_matches = assign(costs)

        found = _sum_images(query_losses(query_logits, query_boxes, valid, objects, matches), len(stages))
        losses: dict[str, Tensor] = {}
        for stage, values in zip(stages, (found / totals.objects).unbind(1), strict=True):
            losses |= _named(values, "", STAGES[stage])
        if terms:
            losses |= self._anchor_losses(terms, overlaps, anchor_matches, totals)
        if noised:
            images_total = len(targets) if totals.images is None else totals.images
            found = _denoising_sums(logits[:, :, :noised], boxes[:, :, :noised], targets, objects, len(stages))
            for stage, values in zip(stages, (found / (noised * images_total)).unbind(1), strict=True):
                losses |= _named(values, "dn_", f"_{list(STAGES).index(stage)}")
        return losses

    def _anchor_losses(
        self, terms: list[_AnchorTerm], overlaps: list[Tensor], matches: list[Matches], totals: BatchTotals
    ) -> dict[str, Tensor]:
        sums = torch.zeros(len(LOSSES), device=overlaps[0].device)
        means = []
        for term, overlap, pairs in zip(terms, overlaps, matches, strict=True):
            found = anchor_losses(term.logits, term.boxes, overlap, term.groups, pairs)
            scale = FIXED_PATCHES / totals.patches if term.probed else 1.0
            sums = sums + _sum_images(found, 1)[:, 0] * scale
            means.append(found.matched_iou.sum() / max(len(found.matched_iou), 1))
        self.statistics = {"iou_anchor": torch.stack(means).mean()}
        return _named(sums / totals.objects, "", "_anchor")

    def _check(
        self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]], stages: list[str], noised: int
    ) -> None:
        if not stages:
            raise ValueError("the outputs hold no proposal_logits and no head's logits")
        expected = (len(targets), noised + outputs["valid"].shape[1], self.num_classes)
        for stage in stages:
            shape = tuple(outputs[f"{stage}_logits"].shape)
            if shape != expected:
                raise ValueError(f"{stage}_logits are {shape}; images, queries and classes ask for {expected}")


def _anchor_terms(outputs: Mapping[str, Any], images: TargetGroups) -> list[_AnchorTerm]:
    """The terms of the levels that are there: P6, P5, and P4 with P3."""
    terms = []
    for level, groups_of in (("p6", flip_groups), ("p5", quarter_groups)):
        if f"{level}_anchors" in outputs:
            anchors = outputs[f"{level}_anchors"].float().flatten(0, 1)
            terms.append(_AnchorTerm(anchors[..., 4], anchors[..., :4], groups_of(images)))
    levels = [level for level in STRIDES if f"{level}_anchors" in outputs]
    if levels:
        anchors = torch.cat([outputs[f"{level}_anchors"].float() for level in levels])
        corners = torch.cat([outputs[f"{level}_crop_xy"] for level in levels])
        image_index = torch.cat([outputs[f"{level}_image_index"] for level in levels])
        strides = torch.cat([torch.full_like(outputs[f"{level}_image_index"], STRIDES[level]) for level in levels])
        groups = patch_groups(images, outputs["image_sizes_hw"], corners, image_index, strides)
        terms.append(_AnchorTerm(anchors[..., 4], anchors[..., :4], groups, probed=True))
    return terms


def _denoising_sums(
    logits: Tensor, boxes: Tensor, targets: Sequence[Mapping[str, Tensor]], objects: TargetGroups, stages: int
) -> Tensor:
    """Losses [3, stages] of the noised queries: logits [stages, B, D, C], boxes [stages, B, D, 4]."""
    counts = [len(target["boxes"]) for target in targets] * stages
    valid, matches = repetition_matches(counts, logits.shape[2], logits.device)
    return _sum_images(query_losses(logits.flatten(0, 1), boxes.flatten(0, 1), valid, objects, matches), stages)


def _sum_images(found: GroupLosses, stages: int) -> Tensor:
    """Class, L1 and GIoU loss of each stage [3, stages], from groups that are stage-major."""
    return torch.stack([found.classification, found.l1, found.giou]).unflatten(1, (stages, -1)).sum(-1)


def _named(values: Iterable[_Value], prefix: str, suffix: str) -> dict[str, _Value]:
    return {f"{prefix}{name}{suffix}": value for name, value in zip(LOSSES, values, strict=True)}
