"""The losses (Deformable DETR, section A.4, and Sparse DETR, sections 3.2 to 3.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from asag.families.deformable.config import LEVELS, DeformableConfig
from asag.families.deformable.training.forward import TrainingOutputs
from asag.training.assignment import PaddedObjects, assign, pad_targets
from asag.training.protocol import Target
from asag.training.recollection import StagePredictions
from asag.training.set_losses import matching_costs, stage_losses
from asag.training.timing import PartTimer

SELECTION = "loss_selection"
"""How well the scores of tokens tell what the decoder looks at."""
KEPT_SHARES = ("kept_share", *(f"kept_share_{level}" for level in range(LEVELS)))
"""How much of what the decoder looks at are kept tokens: of all levels, then of each. They are told, no losses."""


def output_names(config: DeformableConfig) -> list[str]:
    """What is matched and scored: every decoder layer by its number, all tokens, the encoder's layers."""
    names = [str(layer) for layer in range(config.size.decoder_layers)]
    if config.two_stage:
        names.append("proposals")
    if config.encoder_heads:
        names += [f"encoder_{layer}" for layer in range(config.size.encoder_layers - 1)]
    return names


def detection_losses(
    config: DeformableConfig, outputs: TrainingOutputs, targets: Sequence[Target], totals: Tensor, timer: PartTimer
) -> dict[str, Tensor]:
    """Unweighted losses; totals: [2], objects and images of the whole step. Every output is matched by itself."""
    every = pad_targets(targets, totals.device)
    scored = list(_scored(config, outputs, every))
    with timer.part("assignment"):
        matches = assign([matching_costs(*each) for each in scored])
    losses: dict[str, Tensor] = {}
    for name, (found, objects), pairs in zip(output_names(config), scored, matches, strict=True):
        (of_output,) = stage_losses([found], objects, [pairs], totals[0])
        losses |= {f"{kind}_{name}": value for kind, value in of_output.items()}
    if outputs.selection is not None:
        scores, wanted = outputs.selection.scores, outputs.selection.wanted
        each = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
        losses[SELECTION] = each.mean(1).sum() / totals[1]
        shares = outputs.selection.kept_shares.sum(0) / totals[1]
        losses |= dict(zip(KEPT_SHARES, shares, strict=True))
    return losses


def _scored(
    config: DeformableConfig, outputs: TrainingOutputs, objects: PaddedObjects
) -> Iterator[tuple[StagePredictions, PaddedObjects]]:
    """The outputs in the order of their names, with the objects that each is matched to."""
    for found in outputs.decoder:
        yield found, objects
    if outputs.proposals is not None:
        anything = dataclasses.replace(objects, labels=torch.zeros_like(objects.labels))
        yield outputs.proposals, objects if config.rank_by_class else anything
    for found in outputs.encoder:
        yield found, objects
