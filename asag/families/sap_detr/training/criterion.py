"""Matching and losses (sections 3.2 and 3.4; the focal loss is that of Lin et al., "Focal Loss", section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from asag.families.sap_detr.training.forward import LayerPredictions
from asag.parts.boxes import cxcywh_to_xyxy
from asag.training.assignment import Matches, PaddedObjects, assign, pad_targets
from asag.training.boxes import iou_and_giou
from asag.training.protocol import Target
from asag.training.set_losses import FOCAL_ALPHA, FOCAL_GAMMA
from asag.training.timing import PartTimer

CLASS_LOSS = "loss_class"
WEIGHTS = {CLASS_LOSS: 1.0, "loss_objectness": 1.0, "loss_l1": 5.0, "loss_giou": 2.0, "loss_outside": 2.0}
"""Of the losses of a layer. The last one counts the points outside of their objects, so no gradient follows from it:
it is there to be seen.
"""
COSTS = {"class": 2.0, "l1": 5.0, "giou": 2.0, "outside": 9999.0}
"""What a match costs: `outside` where the query's point is not in the object's box."""
ADDED_AREA = 1e-6
"""To what IoU and generalized IoU are divided by."""
INSIDE_LOGARITHM = 1e-8


def loss_name(kind: str, layer: int) -> str:
    """What a loss of a layer is called."""
    return f"{kind}_{layer}"


def detection_losses(
    outputs: Sequence[LayerPredictions], targets: Sequence[Target], totals: Tensor, timer: PartTimer
) -> dict[str, Tensor]:
    """Unweighted losses of every layer, matched by itself; totals: [1], objects of the whole step."""
    objects = pad_targets(targets, totals.device)
    with timer.part("assignment"):
        matches = assign([matching_costs(found, objects) for found in outputs])
    return {
        loss_name(kind, layer): value / totals[0]
        for layer, (found, pairs) in enumerate(zip(outputs, matches, strict=True))
        for kind, value in layer_losses(found, objects, pairs).items()
    }


@torch.no_grad()
def matching_costs(found: LayerPredictions, objects: PaddedObjects) -> Tensor:
    """What it costs to match each query with each object, [B, N, T]; infinite for padding.

    In float64: beside the cost of a point outside, float32 would round the others to thousandths.
    """
    logits, objectness, boxes, points = (
        part.double() for part in (found.logits, found.objectness, found.boxes, found.points)
    )
    wanted = objects.boxes.double()
    columns = objects.labels[:, None, :].expand(-1, logits.shape[1], -1)
    probability = (logits.sigmoid() * objectness.sigmoid().unsqueeze(-1)).gather(2, columns)
    positive = FOCAL_ALPHA * (1 - probability).square() * -(probability + INSIDE_LOGARITHM).log()
    negative = (1 - FOCAL_ALPHA) * probability.square() * -(1 - probability + INSIDE_LOGARITHM).log()
    distance = torch.cdist(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted), p=1)
    _, giou = iou_and_giou(boxes[:, :, None], wanted[:, None], ADDED_AREA)
    outside = is_outside(points[:, :, None], wanted[:, None])
    cost = COSTS["class"] * (positive - negative) + COSTS["l1"] * distance - COSTS["giou"] * giou
    return (cost + COSTS["outside"] * outside).masked_fill(~objects.valid[:, None, :], torch.inf)


def is_outside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points [..., 2] are not in `cxcywh` boxes [..., 4], bool; on the border is in."""
    low, high = cxcywh_to_xyxy(boxes).split(2, dim=-1)
    return ((points < low) | (points > high)).any(-1)


def layer_losses(found: LayerPredictions, objects: PaddedObjects, matches: Matches) -> dict[str, Tensor]:
    """Undivided, unweighted losses of a layer by name."""
    place = (matches.group, matches.query)
    true, labels = (part[matches.group, matches.target] for part in (objects.boxes, objects.labels))
    predicted = found.boxes[place]
    iou, giou = iou_and_giou(predicted, true, ADDED_AREA)
    classes = torch.zeros_like(found.logits)
    classes[(*place, labels)] = 1
    # The overlap is no constant: through it the objectness moves boxes, too.
    quality = torch.zeros_like(found.objectness).index_put(place, iou)
    l1 = (cxcywh_to_xyxy(predicted) - cxcywh_to_xyxy(true)).abs()
    values = (
        soft_focal_loss(found.logits, classes),
        soft_focal_loss(found.objectness, quality),
        l1.sum(),
        (1 - giou).sum(),
        is_outside(found.points[place], true).to(l1.dtype).sum(),
    )
    return dict(zip(WEIGHTS, values, strict=True))


def soft_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of focal losses with targets in 0..1; both of any shape."""
    probability = logits.sigmoid()
    agreement = probability * targets + (1 - probability) * (1 - targets)
    balance = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (balance * entropy * (1 - agreement) ** FOCAL_GAMMA).sum()
