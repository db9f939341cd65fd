"""One-to-one assignment of predictions to objects, for every method that trains without duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from asag.training.protocol import Target
from asag.training.transfer import to_device


@dataclass(frozen=True)
class PaddedObjects:
    """The objects of G groups, padded to T each.

    A group is a matching problem of its own: an image, or whatever a family looks at by itself.
    """

    boxes: Tensor
    """[G, T, 4] float32 `cxcywh` in the group's frame, for an image fractions of its content."""
    labels: Tensor
    """[G, T] int64 class indices."""
    valid: Tensor
    """[G, T] bool, False for padding."""


@dataclass(frozen=True)
class Matches:
    """M matched pairs: int64 tensors [M] with a pair's group, its prediction and its object in the group."""

    group: Tensor
    query: Tensor
    target: Tensor


def pad_targets(targets: Sequence[Target], device: torch.device) -> PaddedObjects:
    """The images' objects as one padded group per image, on `device`.

    They are padded on the CPU, so that targets which are there reach a GPU in one piece. Raises ValueError where
    boxes and labels of an image do not go together.
    """
    counts = [int(target["boxes"].shape[0]) for target in targets]
    most = max(counts, default=0)
    boxes = torch.zeros(len(targets), most, 4)
    labels = torch.zeros(len(targets), most, dtype=torch.int64)
    for image, (target, count) in enumerate(zip(targets, counts, strict=True)):
        if target["labels"].shape != (count,) or target["boxes"].shape != (count, 4):
            raise ValueError(
                f"target {image}: boxes must be [n, 4] and labels [n], got "
                f"{tuple(target['boxes'].shape)} and {tuple(target['labels'].shape)}"
            )
        boxes[image, :count] = target["boxes"]
        labels[image, :count] = target["labels"]
    valid = torch.arange(most) < torch.tensor(counts, dtype=torch.int64).reshape(-1, 1)
    return PaddedObjects(*(to_device(part, device) for part in (boxes, labels, valid)))


def assign(costs: Sequence[Tensor]) -> list[Matches]:
    """The cheapest pairs of the groups of several cost tensors [G, Q, T] (the Hungarian algorithm).

    All of them take one transfer to the CPU and one back. An infinite row or column is padding and stays out. A group
    with fewer predictions than objects leaves objects unmatched. Raises ValueError when a prediction is not a number.
    """
    if not costs:
        return []
    device = costs[0].device
    flat = torch.cat([cost.detach().flatten() for cost in costs]).cpu().numpy()
    if np.isnan(flat).any():
        raise ValueError("the predictions hold values that are not numbers; lower the learning rate or resume earlier")
    solved, start = [], 0
    for cost in costs:
        solved.append(_solve(flat[start : start + cost.numel()].reshape(cost.shape)))
        start += cost.numel()
    indices = to_device(torch.from_numpy(np.concatenate(solved, axis=1)), device)
    parts = indices.split([part.shape[1] for part in solved], dim=1)
    return [Matches(*part.unbind(0)) for part in parts]


def _solve(costs: np.ndarray) -> np.ndarray:
    """Indices [3, M] int64 (group, prediction, object) of the optimal assignment of each group in [G, Q, T]."""
    usable = np.isfinite(costs)
    rows, columns = usable.any(2), usable.any(1)
    parts = [np.empty((3, 0), dtype=np.int64)]
    for group in np.flatnonzero(columns.any(1)):
        row = np.flatnonzero(rows[group])
        column = np.flatnonzero(columns[group])
        query, target = linear_sum_assignment(costs[group][np.ix_(row, column)])
        parts.append(np.stack([np.full_like(query, group), row[query], column[target]]))
    return np.concatenate(parts, axis=1)
