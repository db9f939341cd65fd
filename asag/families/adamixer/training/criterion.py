"""The losses of a stage's copies (AdaMixer, section 4.1; the matching is that of Sparse R-CNN, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from asag.families.adamixer.training.forward import StagePredictions
from asag.parts.boxes import cxcywh_to_xyxy
from asag.training.assignment import Matches, PaddedObjects, assign, pad_targets
from asag.training.boxes import iou_and_giou
from asag.training.protocol import Target
from asag.training.timing import PartTimer

LOSSES = ("loss_class", "loss_l1", "loss_giou")
WEIGHTS = (2.0, 5.0, 2.0)
"""Of the losses, and of the same three in what a match costs."""
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
FOCAL_EPSILON = 1e-12
"""Inside the logarithms of the class cost."""


def loss_name(kind: str, stage: int) -> str:
    """What the sum over a stage's copies is called."""
    return f"{kind}_{stage}"


def detection_losses(
    outputs: Sequence[StagePredictions], targets: Sequence[Target], pairs: Tensor, timer: PartTimer
) -> dict[str, Tensor]:
    """Unweighted losses of every stage, summed over its copies: deep stages, which have more, weigh more.

    pairs: scalar, matched pairs of a copy in the whole step. Every copy is matched by itself.
    """
    objects = pad_targets(targets, pairs.device)
    with timer.part("assignment"):
        matches = assign([matching_costs(found, objects) for found in outputs])
    losses: dict[str, Tensor] = {}
    for stage, (found, matched) in enumerate(zip(outputs, matches, strict=True)):
        sums = copy_losses(found, objects, matched).sum(1) / pairs
        losses |= {loss_name(kind, stage): value for kind, value in zip(LOSSES, sums.unbind(), strict=True)}
    return losses


def repeated(objects: PaddedObjects, times: int) -> PaddedObjects:
    """The objects of every copy's images: group `k * B + b` is image b."""
    parts = (objects.boxes, objects.labels, objects.valid)
    return PaddedObjects(*(part.repeat(times, *[1] * (part.dim() - 1)) for part in parts))


@torch.no_grad()
def matching_costs(found: StagePredictions, objects: PaddedObjects) -> Tensor:
    """What it costs to match each query with each object, [K * B, N, T]; infinite for padding.

    Focal class cost, L1 distance of the corners as fractions of the content, and generalized IoU.
    """
    logits, boxes = found.logits.flatten(0, 1), found.boxes.flatten(0, 1)
    wanted = repeated(objects, found.logits.shape[0])
    columns = wanted.labels[:, None, :].expand(-1, logits.shape[1], -1)
    probability = logits.sigmoid().gather(2, columns)
    positive = FOCAL_ALPHA * (1 - probability).square() * -(probability + FOCAL_EPSILON).log()
    negative = (1 - FOCAL_ALPHA) * probability.square() * -(1 - probability + FOCAL_EPSILON).log()
    distance = torch.cdist(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted.boxes), p=1)
    _, giou = iou_and_giou(boxes[:, :, None], wanted.boxes[:, None])
    of_class, of_l1, of_giou = WEIGHTS
    cost = of_class * (positive - negative) + of_l1 * distance - of_giou * giou
    return cost.masked_fill(~wanted.valid[:, None, :], torch.inf)


def copy_losses(found: StagePredictions, objects: PaddedObjects, matches: Matches) -> Tensor:
    """Undivided, unweighted losses of each copy, [3, K]; matches: of the groups of :func:`repeated`."""
    count, images = found.logits.shape[:2]
    logits, boxes = found.logits.flatten(0, 1), found.boxes.flatten(0, 1)
    image = matches.group % images
    wanted = torch.zeros_like(logits)
    wanted[matches.group, matches.query, objects.labels[image, matches.target]] = 1
    focal = sigmoid_focal_loss(logits, wanted, FOCAL_ALPHA, FOCAL_GAMMA)
    predicted, true = boxes[matches.group, matches.query], objects.boxes[image, matches.target]
    l1 = (cxcywh_to_xyxy(predicted) - cxcywh_to_xyxy(true)).abs().sum(-1)
    _, giou = iou_and_giou(predicted, true)
    of_pairs = torch.zeros((2, count), device=logits.device)
    of_pairs = of_pairs.index_add(1, matches.group // images, torch.stack((l1, 1 - giou)))
    return torch.cat((focal.unflatten(0, (count, images)).sum((1, 2, 3)).unsqueeze(0), of_pairs))
