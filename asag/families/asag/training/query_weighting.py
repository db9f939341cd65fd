"""Query weighting and the weighted losses of matched and unmatched predictions (README of the family, section 7).

The weights of a matched pair say how good the pair is, from its score `p` and its IoU `u`; they are constants of
the loss (no gradient flows through them). The factors `p^2` and `|u - p|^2` are focal factors and keep theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from asag.families.asag.training.matching import TargetGroups
from asag.training.assignment import Matches
from asag.training.boxes import iou_and_giou

SCORE_POWER = 0.4
IOU_POWER = 0.6
GOOD_IOU = 0.5
"""From this IoU on, a matched pair's negative weight falls, and an unmatched anchor is no negative."""


@dataclass(frozen=True)
class GroupLosses:
    """Undivided, unweighted losses of each group, float32 [G] each."""

    classification: Tensor
    l1: Tensor
    giou: Tensor


def weighting_curve(quality: Tensor) -> Tensor:
    """`g(x) = sigmoid(4.5 * (x - 1/3)) / sigmoid(3)`, from about 0.19 at 0 to 1 at 1."""
    return torch.sigmoid(4.5 * (quality - 1 / 3)) * (1 + math.exp(-3))


def pair_weights(score: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
    """`w_pos` and `w_neg` of matched pairs with `score` and `iou` in [0, 1], of any one shape; detached."""
    score_part = score.detach().pow(SCORE_POWER)
    iou_part = iou.detach().pow(IOU_POWER)
    positive = weighting_curve(score_part * iou_part)
    falling = (iou_part.square() - 1) / (GOOD_IOU**2 - 1)
    doubt = torch.where(iou_part < GOOD_IOU, torch.ones_like(falling), falling)
    negative = weighting_curve(doubt * score_part) - weighting_curve(torch.zeros_like(score_part))
    return positive, negative


def query_losses(logits: Tensor, boxes: Tensor, valid: Tensor, groups: TargetGroups, matches: Matches) -> GroupLosses:
    """Losses of the proposals or of a head.

    `logits` [G, Q, C] and `boxes` [G, Q, 4] (`cxcywh`, fractions of the content) of the `valid` [G, Q] queries.
    Every entry of a valid query that is not a matched one is a negative of weight `p^2`.
    """
    label = groups.labels[matches.group, matches.target]
    logit = logits[matches.group, matches.query, label]
    l1, giou, iou = _box_distances(boxes, groups, matches)
    positive, negative = pair_weights(logit.sigmoid(), iou)
    factor = groups.area_factor[matches.group, matches.target]
    matched = factor * (positive * F.softplus(-logit) + negative * F.softplus(logit))

    unmatched = valid[:, :, None].expand_as(logits).clone()
    unmatched[matches.group, matches.query, label] = False
    background = (logits.sigmoid().square() * F.softplus(logits)).masked_fill(~unmatched, 0.0)
    weight = factor * positive
    return _sum_by_group(background, torch.stack([matched, weight * l1, weight * giou]), matches)


def anchor_losses(logits: Tensor, boxes: Tensor, iou: Tensor, groups: TargetGroups, matches: Matches) -> GroupLosses:
    """Losses of a patch's anchors: quality focal loss to the IoU, and boxes weighted by `w_pos`.

    `logits` [G, k] confidences before the sigmoid, `boxes` [G, k, 4] (`cxcywh`, fractions of the patch), `iou`
    [G, k, T] of every anchor with its own patch's objects. An unmatched anchor that lies well on one of them
    (IoU >= 0.5) is left in peace.
    """
    logit = logits[matches.group, matches.query]
    score = logit.sigmoid()
    l1, giou, matched_iou = _box_distances(boxes, groups, matches)
    factor = groups.area_factor[matches.group, matches.target]
    entropy = F.binary_cross_entropy_with_logits(logit, matched_iou, reduction="none")
    matched = factor * (matched_iou - score).square() * entropy

    close = (iou >= GOOD_IOU) & groups.valid[:, None, :]
    silent = close.any(-1)
    silent[matches.group, matches.query] = True
    background = (logits.sigmoid().square() * F.softplus(logits)).masked_fill(silent, 0.0)
    weight = factor * pair_weights(score, matched_iou)[0]
    return _sum_by_group(background, torch.stack([matched, weight * l1, weight * giou]), matches)


def _box_distances(boxes: Tensor, groups: TargetGroups, matches: Matches) -> tuple[Tensor, Tensor, Tensor]:
    """L1 distance, `1 - GIoU` and the detached IoU of the matched pairs, [M] each."""
    predicted = boxes[matches.group, matches.query]
    wanted = groups.boxes[matches.group, matches.target]
    iou, giou = iou_and_giou(predicted, wanted)
    return (predicted - wanted).abs().sum(-1), 1 - giou, iou.detach()


def _sum_by_group(background: Tensor, pairs: Tensor, matches: Matches) -> GroupLosses:
    """Sum `background` [G, ...] over all but its groups, and the pairs' three losses [3, M] into their groups."""
    negatives = background.flatten(1).sum(1)
    sums = torch.zeros(3, len(negatives), device=pairs.device).index_add(1, matches.group, pairs)
    return GroupLosses(negatives + sums[0], sums[1], sums[2])
