"""How far two runs of one model are apart at every stage; how a value is compared follows from its kind alone.

Every difference is relative, so that one tolerance fits all stages: maps and queries over the largest magnitude of the
reference's, boxes and points over the longer side of the input (or of the content, where they are fractions of it),
Gaussians' centres like these and their standard deviations per pixel over the largest of the reference's, confidences
and scores (after the sigmoid) as they are. All arrays are of a batch of one image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asag.family import Stage, Value

Values = Mapping[str, NDArray]
"""By name, `stage/value`."""

Difference = tuple[float, float, int]
"""Largest, mean, and how many places, rows or detections have no counterpart."""

_IDENTITIES = ("places", "cells")
"""Kinds whose values say themselves which of the other side's is the same."""

_SAME_BOX = 0.01
"""Boxes further apart than this share of the frame's side are not the same one."""


@dataclass(frozen=True)
class _Pairs:
    """Rows of both sides that stand for the same thing, out of so many rows."""

    reference: NDArray[np.int64]
    candidate: NDArray[np.int64]
    rows: tuple[int, int]


def stage_differences(
    stages: Sequence[Stage], reference: Values, candidate: Values, input_side: float
) -> dict[str, Difference]:
    """The difference of every stage, by its title, of which both sides show a value.

    input_side: longer side of the input in pixels.
    """
    found: dict[str, Difference] = {}
    pairs: _Pairs | None = None
    for stage in stages:
        values = [
            (value, reference[name], candidate[name])
            for value in stage.values
            if (name := f"{stage.name}/{value.name}") in reference and name in candidate
        ]
        if not values:
            continue
        alone = 0
        if stage.aligns:
            pairs, alone = _aligned(stage, values, input_side)
            values = [item for item in values if item[0].kind not in ("valid", *_IDENTITIES)]
        parts = [_difference(value, ours, theirs, pairs, input_side) for value, ours, theirs in values]
        largest = max((part[0] for part in parts), default=0.0)
        mean = sum(part[1] for part in parts) / max(len(parts), 1)
        found[stage.title] = largest, mean, alone + sum(p[2] for p in parts)
    return found


def _difference(
    value: Value, reference: NDArray, candidate: NDArray, pairs: _Pairs | None, input_side: float
) -> Difference:
    if value.kind == "maps":
        return _relative(reference, candidate, None)
    ours, theirs = _rows(reference, candidate, pairs)
    if ours.shape != theirs.shape:
        return math.inf, math.inf, abs(len(ours) - len(theirs))
    if value.kind in ("valid", *_IDENTITIES):
        return 0.0, 0.0, int((ours != theirs).any(axis=tuple(range(1, ours.ndim))).sum())
    if value.kind == "queries":
        return _relative(ours, theirs, None)
    if value.kind == "scores":
        return _relative(_sigmoid(ours), _sigmoid(theirs), 1.0)
    side = input_side if value.frame == "input" else 1.0
    # What follows a box's corners or a point's place is a confidence or a logarithm, compared as it is.
    placed, others = (4 if value.kind == "boxes" else 2), 1.0
    if value.kind == "gaussians":
        others = float(np.abs(ours[..., placed:]).max(initial=0.0)) or 1.0
    divisor = np.array([side / value.unit] * placed + [others] * (ours.shape[-1] - placed))
    return _relative(ours, theirs, divisor)


def _relative(reference: NDArray, candidate: NDArray, divisor: NDArray | float | None) -> Difference:
    """Differences over ``divisor``, by default the largest magnitude of the reference."""
    if reference.shape != candidate.shape:
        return math.inf, math.inf, 0
    difference = np.abs(reference.astype(np.float64) - candidate)
    if divisor is None:
        divisor = float(np.abs(reference).max(initial=0.0)) or 1.0
    return *largest_and_mean(difference / divisor), 0


def largest_and_mean(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Both infinite where a difference is not a number, so that no comparison lets it pass."""
    if not differences.size:
        return 0.0, 0.0
    if np.isnan(differences).any():
        return math.inf, math.inf
    return float(differences.max()), float(differences.mean())


def _sigmoid(logits: NDArray) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-logits.astype(np.float64)))


def _rows(reference: NDArray, candidate: NDArray, pairs: _Pairs | None) -> tuple[NDArray, NDArray]:
    """The rows to compare: those that are paired, where the value has a row, or several, for each of them."""
    ours, theirs = reference[0], candidate[0]
    if pairs is None or len(ours) % pairs.rows[0] or len(theirs) % pairs.rows[1]:
        return ours, theirs

    def chosen(values: NDArray, rows: int, places: NDArray[np.int64]) -> NDArray:
        grouped = values.reshape(rows, len(values) // rows, *values.shape[1:])
        return grouped[places].reshape(-1, *values.shape[1:])

    return chosen(ours, pairs.rows[0], pairs.reference), chosen(theirs, pairs.rows[1], pairs.candidate)


def _aligned(stage: Stage, values: Sequence[tuple[Value, NDArray, NDArray]], input_side: float) -> tuple[_Pairs, int]:
    """Which rows of both sides are the same, and how many have no counterpart."""
    kinds = {value.kind: (value, ours[0], theirs[0]) for value, ours, theirs in values}
    by, ours, theirs = kinds.get("places") or kinds.get("cells") or kinds["boxes"]
    rows = len(ours), len(theirs)
    exist = [np.ones(count, bool) for count in rows]
    if "valid" in kinds:
        exist = [kinds["valid"][1].astype(bool), kinds["valid"][2].astype(bool)]
    places = [np.flatnonzero(valid) for valid in exist]
    if by.kind in _IDENTITIES:
        chosen = _same_places(ours[places[0]], theirs[places[1]])
    else:
        side = input_side if by.frame == "input" else 1.0
        chosen = _same_boxes(ours[places[0], :4] / side, theirs[places[1], :4] / side, stage.tolerance)
    alone = len(places[0]) + len(places[1]) - 2 * len(chosen)
    return _Pairs(places[0][chosen[:, 0]], places[1][chosen[:, 1]], rows), alone


def _same_places(reference: NDArray, candidate: NDArray) -> NDArray[np.int64]:
    """Index pairs [M, 2] of equal places or cells."""
    ours, theirs = ([tuple(np.ravel(place).tolist()) for place in side] for side in (reference, candidate))
    of_place = {place: index for index, place in enumerate(theirs)}
    pairs = [(index, of_place.get(place)) for index, place in enumerate(ours)]
    return np.array([pair for pair in pairs if pair[1] is not None], np.int64).reshape(-1, 2)


def _same_boxes(reference: NDArray, candidate: NDArray, tolerance: float) -> NDArray[np.int64]:
    """Index pairs [M, 2] of the same boxes, in fractions of the frame, one to one: another order is no difference."""
    if len(reference) == len(candidate) and np.abs(reference - candidate).max(initial=0.0) <= tolerance:
        return np.repeat(np.arange(len(reference))[:, None], 2, axis=1)
    distance = np.abs(reference[:, None].astype(np.float64) - candidate[None]).max(axis=2, initial=0.0)
    rows, columns = np.nonzero(distance <= _SAME_BOX)
    free_rows, free_columns = np.ones(len(reference), bool), np.ones(len(candidate), bool)
    pairs = []
    for place in np.argsort(distance[rows, columns], kind="stable"):
        row, column = rows[place], columns[place]
        if free_rows[row] and free_columns[column]:
            free_rows[row] = free_columns[column] = False
            pairs.append((row, column))
    return np.array(pairs, np.int64).reshape(-1, 2)
