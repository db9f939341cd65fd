"""Which candidates are deformable attention, found by running the file.

What an attention reads and gives is worked out from the GridSamples' inputs, the weights and the sum that the file
computes, in the order of axes that the op has. A value of the file that has the same numbers bit for bit is the same
value laid out otherwise, as only layout lies between; most of its numbers must differ from one another for that. That
the file sums what the op sums, is seen by computing the op itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asag.export.adoption.attention import Candidate
from asag.ops import deformable_attention_definition

Array = NDArray[Any]
MOSTLY_DISTINCT = 0.5
"""Share of a value's numbers that must differ, so that equal numbers mean equal places."""

LOOKED_AT = 50_000
"""Of a larger value so many numbers are compared with one another."""

TOLERANCE = 1e-4
"""Of the largest number: how far the file's sum may be from the op's. Samples of a map of 200 cells differ by 3e-5."""


@dataclass(frozen=True)
class Attention:
    """A candidate that is deformable attention, and where its inputs and its result lie in the file.

    A name is None where no value of the file has the op's order of axes; then it is to be laid out from the candidate's
    own values.
    """

    candidate: Candidate
    heads: int
    channels: int
    level_shapes: tuple[tuple[int, int], ...]
    level_points: tuple[int, ...]
    queries: int
    half: bool
    """Whether the file computes it in float16."""
    value: str | None
    locations: str | None
    weights: str | None
    result: str | None


@dataclass(frozen=True)
class _Canonical:
    """What one run of a candidate gives, in the op's order of axes."""

    value: Array
    grid: Array
    weights: Array
    result: Array
    shapes: tuple[tuple[int, int], ...]
    points: tuple[int, ...]


def names_to_observe(candidate: Candidate) -> tuple[str, ...]:
    """The values that decide about a candidate."""
    levels = [name for level in candidate.levels for name in (level.value, level.grid)]
    proposed = (candidate.values, candidate.locations, candidate.weight_layouts, candidate.results)
    return tuple(dict.fromkeys([*levels, candidate.weights, candidate.total, *(n for part in proposed for n in part)]))


def verify(candidate: Candidate, runs: Mapping[int, Mapping[str, Array]]) -> Attention | None:
    """The attention that a candidate is in all runs, by their batch sizes; None where it is none."""
    found = None
    for batch, seen in runs.items():
        canonical = _canonical(candidate, seen, batch)
        if canonical is None or not _is_attention(canonical):
            return None
        here = _named(candidate, canonical, seen)
        found = here if found is None else _in_both(found, here)
        if found is None:
            return None
    return found


def _canonical(candidate: Candidate, seen: Mapping[str, Array], batch: int) -> _Canonical | None:
    values = [seen[level.value] for level in candidate.levels]
    grids = [seen[level.grid] for level in candidate.levels]
    weights, total = seen[candidate.weights], seen[candidate.total]
    rows, channels = values[0].shape[:2]
    queries = grids[0].shape[1]
    points = tuple(grid.shape[2] for grid in grids)
    if rows % batch or any(value.ndim != 4 or value.shape[:2] != (rows, channels) for value in values):
        return None
    if any(grid.ndim != 4 or grid.shape[:2] != (rows, queries) for grid in grids):
        return None
    if weights.shape != (rows, 1, queries, sum(points)) or total.shape != (rows, channels, queries):
        return None
    heads = rows // batch
    cells = np.concatenate([value.reshape(rows, channels, -1) for value in values], 2)
    return _Canonical(
        value=cells.reshape(batch, heads, channels, -1).transpose(0, 3, 1, 2),
        grid=np.concatenate(grids, 2).reshape(batch, heads, queries, -1, 2).transpose(0, 2, 1, 3, 4),
        weights=weights.reshape(batch, heads, queries, -1).transpose(0, 2, 1, 3),
        result=total.reshape(batch, heads * channels, queries).transpose(0, 2, 1),
        shapes=tuple((value.shape[2], value.shape[3]) for value in values),
        points=points,
    )


def _is_attention(found: _Canonical) -> bool:
    """Whether the op, computed of these inputs, gives this result, and the numbers are worth the comparison."""
    if not all(np.isfinite(values).all() for values in (found.value, found.weights, found.result)):
        return False
    if not all(_distinct(values) for values in (found.value, found.grid, found.weights, found.result)):
        return False
    value, weights, grid = (
        torch.from_numpy(np.ascontiguousarray(values, np.float32))
        for values in (found.value, found.weights, found.grid)
    )
    sides = [side for shape in found.shapes for side in shape]
    computed = deformable_attention_definition(value, (grid + 1) / 2, weights, sides, found.points).numpy()
    largest = float(np.abs(found.result).max())
    tolerance = TOLERANCE if found.result.dtype == np.float32 else 1e-2
    return float(np.abs(computed - found.result).max()) <= tolerance * largest


def _named(candidate: Candidate, canonical: _Canonical, seen: Mapping[str, Array]) -> Attention:
    heads, channels = canonical.value.shape[2:]
    two, one = (np.asarray(number, canonical.grid.dtype) for number in (2, 1))

    def first(
        names: Sequence[str], wanted: Array, change: Callable[[Array], Array] = lambda values: values
    ) -> str | None:
        """The value that is laid out as wanted without any change, else the first that is after a Reshape."""
        same = [name for name in names if seen[name].size == wanted.size and seen[name].dtype == wanted.dtype]
        same = [name for name in same if np.array_equal(change(seen[name]).ravel(), wanted.ravel(), equal_nan=True)]
        return min(same, key=lambda name: seen[name].shape != wanted.shape, default=None)

    return Attention(
        candidate=candidate,
        heads=heads,
        channels=channels,
        level_shapes=canonical.shapes,
        level_points=canonical.points,
        queries=canonical.result.shape[1],
        half=canonical.grid.dtype == np.float16,
        value=first(candidate.values, canonical.value),
        locations=first(candidate.locations, canonical.grid, lambda values: values * two - one),
        weights=first(candidate.weight_layouts, canonical.weights),
        result=first(candidate.results, canonical.result),
    )


def _in_both(one: Attention, other: Attention) -> Attention | None:
    """What two runs agree on: names that hold in both; None where the attentions differ."""

    def both(first: str | None, second: str | None) -> str | None:
        return first if first == second else None

    value, locations = both(one.value, other.value), both(one.locations, other.locations)
    weights, result = both(one.weights, other.weights), both(one.result, other.result)
    one, other = (
        replace(found, value=value, locations=locations, weights=weights, result=result) for found in (one, other)
    )
    return one if one == other else None


def _distinct(values: Array) -> bool:
    """Whether most numbers of an image differ; those of two may be the same, as the first queries of a decoder are."""
    flat = values[0].ravel()
    some = flat[:: max(1, flat.size // LOOKED_AT)]
    return len(np.unique(some)) >= MOSTLY_DISTINCT * some.size
