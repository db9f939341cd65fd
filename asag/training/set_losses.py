"""Losses of predictions that are matched to objects one to one: focal, L1 and generalized IoU.

Deformable DETR, section A.4; AdaMixer, section 4.1; both after DETR (Carion et al., ECCV 2020, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from asag.training.assignment import Matches, PaddedObjects
from asag.training.boxes import iou_and_giou
from asag.training.recollection import StagePredictions

LOSSES = ("loss_class", "loss_l1", "loss_giou")
WEIGHTS = (2.0, 5.0, 2.0)
"""Of the losses, and of the same three in what a match costs."""
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0

Coordinates = Callable[[Tensor], Tensor]
"""What of `cxcywh` boxes, fractions of the content, the L1 distance is between."""


def same(boxes: Tensor) -> Tensor:
    """The boxes as they are."""
    return boxes


def repeated(objects: PaddedObjects, times: int) -> PaddedObjects:
    """The objects of every copy's images: group `k * B + b` is image b."""
    parts = (objects.boxes, objects.labels, objects.valid)
    return PaddedObjects(*(part.repeat(times, *[1] * (part.dim() - 1)) for part in parts))


@torch.no_grad()
def matching_costs(
    found: StagePredictions, objects: PaddedObjects, coordinates: Coordinates = same, epsilon: float = 1e-8
) -> Tensor:
    """What it costs to match each query with each object, [K * B, N, T]; infinite for padding.

    Focal class cost, with `epsilon` inside its logarithms, L1 distance and generalized IoU.
    """
    logits, boxes = found.logits.flatten(0, 1), found.boxes.flatten(0, 1)
    wanted = repeated(objects, found.logits.shape[0])
    columns = wanted.labels[:, None, :].expand(-1, logits.shape[1], -1)
    probability = logits.sigmoid().gather(2, columns)
    positive = FOCAL_ALPHA * (1 - probability).square() * -(probability + epsilon).log()
    negative = (1 - FOCAL_ALPHA) * probability.square() * -(1 - probability + epsilon).log()
    distance = torch.cdist(coordinates(boxes), coordinates(wanted.boxes), p=1)
    _, giou = iou_and_giou(boxes[:, :, None], wanted.boxes[:, None])
    of_class, of_l1, of_giou = WEIGHTS
    cost = of_class * (positive - negative) + of_l1 * distance - of_giou * giou
    return cost.masked_fill(~wanted.valid[:, None, :], torch.inf)


def copy_losses(
    found: StagePredictions, objects: PaddedObjects, matches: Matches, coordinates: Coordinates = same
) -> Tensor:
    """Undivided, unweighted losses of each copy, [3, K]; matches: of the groups of :func:`repeated`."""
    count, images = found.logits.shape[:2]
    logits, boxes = found.logits.flatten(0, 1), found.boxes.flatten(0, 1)
    image = matches.group % images
    wanted = torch.zeros_like(logits)
    wanted[matches.group, matches.query, objects.labels[image, matches.target]] = 1
    focal = sigmoid_focal_loss(logits, wanted, FOCAL_ALPHA, FOCAL_GAMMA)
    predicted, true = boxes[matches.group, matches.query], objects.boxes[image, matches.target]
    l1 = (coordinates(predicted) - coordinates(true)).abs().sum(-1)
    _, giou = iou_and_giou(predicted, true)
    of_pairs = torch.zeros((2, count), device=logits.device)
    of_pairs = of_pairs.index_add(1, matches.group // images, torch.stack((l1, 1 - giou)))
    return torch.cat((focal.unflatten(0, (count, images)).sum((1, 2, 3)).unsqueeze(0), of_pairs))


def stage_losses(
    found: Sequence[StagePredictions],
    objects: PaddedObjects,
    matches: Sequence[Matches],
    divisor: Tensor,
    coordinates: Coordinates = same,
) -> list[dict[str, Tensor]]:
    """Unweighted losses of every stage by name, summed over its copies: stages that have more weigh more."""
    return [
        dict(zip(LOSSES, (copy_losses(one, objects, pairs, coordinates).sum(1) / divisor).unbind(), strict=True))
        for one, pairs in zip(found, matches, strict=True)
    ]
