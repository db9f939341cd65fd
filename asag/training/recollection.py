"""Selective query recollection: which earlier queries a stage of a decoder trains on (Chen et al., CVPR 2023, 4.2).

A stage trains on what the two stages before it made, not only the last one. Each set of queries passes the stage by
itself, as a *copy*; copies never see one another. The last copy of every stage is the ordinary path, the only one that
there is at inference. So the stages have 1, 2, 3, 5, 8, 13, .. copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Copies = tuple[Tensor, ...]
"""K sets of queries of B images, as many tensors as a query has parts: each [K, B, N, ...]."""


@dataclass(frozen=True)
class StagePredictions:
    """What the copies of one stage say."""

    logits: Tensor
    """[K, B, N, classes]"""
    boxes: Tensor
    """[K, B, N, 4] `cxcywh`, fractions of the content."""


def recollected(before: Copies | None, last: Copies, recollection: str) -> Copies:
    """What a stage trains on: what the stage before it made, `last`, after what the one before that made.

    recollection: one of :data:`asag.training.settings.RECOLLECTIONS`.
    """
    if before is None or recollection == "none":
        return last
    return tuple(torch.cat(parts) for parts in zip(before, last, strict=True))


COSTS = {
    "one_by_one": "each is computed twice, and one at a time is in memory",
    "batched": "fast, with all of them in memory at once; one_by_one takes less",
}
"""Of the forms of recollection."""


def recollected_copies(stages: int) -> tuple[int, ...]:
    """How many copies each stage trains on: one, two, and from there as many as the two stages before it."""
    counts = [1, 2]
    while len(counts) < stages:
        counts.append(sum(counts[-2:]))
    return tuple(counts[:stages])


def remarks(stages: int, recollection: str) -> tuple[str, ...]:
    """What whoever starts a run should know of its recollection."""
    if recollection == "none":
        return ()
    copies = sum(recollected_copies(stages))
    return (f"recollection: {copies} copies of {stages} stages a step, {recollection}: {COSTS[recollection]}",)


def one_by_one(stage: Callable[..., Copies], given: Copies) -> Copies:
    """What `stage`, which takes the parts of one copy, each [B, N, ...], makes of every copy by itself.

    Each is computed once more when its gradient is: in between nothing is kept of it but what it began with.
    """
    made = [checkpoint(stage, *copy, use_reentrant=False) for copy in zip(*given, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*made, strict=True))


def as_images(part: Tensor) -> Tensor:
    """[K, B, N, ...] -> [K * B, N, ...], where queries see one another."""
    return part.flatten(0, 1)


def as_queries(part: Tensor) -> Tensor:
    """[K, B, N, ...] -> [B, K * N, ...], where every query is alone with its image, so that no map is repeated."""
    return part.transpose(0, 1).flatten(1, 2)


def as_copies(part: Tensor, count: int) -> Tensor:
    """The [K, B, N, ...] that :func:`as_queries` laid out; count: K."""
    return part.unflatten(1, (count, part.shape[1] // count)).transpose(0, 1)
