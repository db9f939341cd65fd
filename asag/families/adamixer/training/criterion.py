"""The losses of a stage's copies (AdaMixer, section 4.1; the matching is that of Sparse R-CNN, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from asag.parts.boxes import cxcywh_to_xyxy
from asag.training.assignment import assign, pad_targets
from asag.training.protocol import Target
from asag.training.recollection import StagePredictions
from asag.training.set_losses import matching_costs, stage_losses
from asag.training.timing import PartTimer

COORDINATES = cxcywh_to_xyxy
"""The L1 distance is between corners."""
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
        matches = assign([matching_costs(found, objects, COORDINATES, FOCAL_EPSILON) for found in outputs])
    losses = stage_losses(outputs, objects, matches, pairs, COORDINATES)
    return {loss_name(kind, stage): value for stage, each in enumerate(losses) for kind, value in each.items()}
