"""Which candidates are deformable attention, found by running the file.

First the file runs on pictures. What an attention reads and gives is worked out from the GridSamples' inputs, the
weights and the sum that the file computes, in the order of axes that the op has; a value of the file with the same
numbers bit for bit is proposed as the same value laid out otherwise. Then the file runs once more with random numbers
in the place of these values, and must give what the op gives of them: so nothing depends on what the pictures happened
to be, and values whose numbers repeat are told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper

from asag.export.adoption.attention import Candidate
from asag.export.adoption.execution import FileRun
from asag.export.adoption.graph import prune
from asag.export.adoption.graph import replace as replace_items
from asag.ops import deformable_attention_definition

Array = NDArray[Any]
Values = Mapping[str, Array]

TOLERANCE = 1e-4
"""Of the largest number: how far the file's sum may be from the op's. Samples of a map of 200 cells differ by 3e-5."""

AT_ONCE = 4
"""So many attentions are confirmed in one run: more of a large encoder take gigabytes, fewer take longer."""


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
    value: str | None
    locations: str | None
    weights: str | None
    result: str | None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values that it is computed of."""
        levels = self.candidate.levels
        return (
            *([self.value] if self.value else [level.value for level in levels]),
            *([self.locations] if self.locations else [level.grid for level in levels]),
            self.weights or self.candidate.weights,
        )

    @property
    def output(self) -> str:
        """Name of the value that it gives."""
        return self.result or self.candidate.total


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


def propose(candidate: Candidate, seen: Values, batch: int) -> Attention | None:
    """The attention that a candidate may be by its values in a run of so many images; None where it is none."""
    canonical = _canonical(candidate, seen, batch)
    return None if canonical is None else _named(candidate, canonical, seen)


def without_numbers(seen: Values) -> dict[str, Array]:
    """Arrays of the same types and shapes that take no memory."""
    return {name: np.broadcast_to(np.zeros((), values.dtype), values.shape) for name, values in seen.items()}


def confirm(
    proto: onnx.ModelProto, proposed: Sequence[Attention], runs: Mapping[int, Values], feeds: Mapping[int, Values]
) -> tuple[Attention, ...]:
    """Those of the proposed attentions of a file that give what the op gives, of random numbers in all runs.

    One that does not is tried again with its inputs and result where they surely lie, at its GridSamples and its sum.
    runs: by batch size, arrays of the types and shapes of the values, whose numbers do not count; feeds: what the file
    was fed in each run.
    """
    confirmed: list[Attention] = []
    for attempt in (
        proposed,
        [replace(one, value=None, locations=None, weights=None, result=None) for one in proposed],
    ):
        missing = {one.candidate.total for one in proposed} - {one.candidate.total for one in confirmed}
        left = [one for one in attempt if one.candidate.total in missing]
        for start in range(0, len(left), AT_ONCE):
            confirmed += _confirmed(proto, left[start : start + AT_ONCE], runs, feeds)
    return tuple(confirmed)


def _confirmed(
    proto: onnx.ModelProto, attentions: Sequence[Attention], runs: Mapping[int, Values], feeds: Mapping[int, Values]
) -> list[Attention]:
    if not attentions:
        return []
    injected = sorted({name for one in attentions for name in one.inputs})
    some = next(iter(runs.values()))
    cut = _cut(proto, {name: some[name] for name in injected}, [one.output for one in attentions])
    run = FileRun(cut, optimized=False)
    right = set(range(len(attentions)))
    for batch, seen in runs.items():
        random = np.random.default_rng(batch)
        values = {name: random.uniform(-1.2, 1.2, seen[name].shape).astype(seen[name].dtype) for name in injected}
        outputs = run.run({**feeds[batch], **values})
        right &= {place for place in right if _gives(attentions[place], values, outputs, batch)}
    return [attentions[place] for place in sorted(right)]


def _cut(proto: onnx.ModelProto, injected: Values, outputs: Sequence[str]) -> onnx.ModelProto:
    """A copy of a file that takes some of its values as inputs, and gives others."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    replace_items(graph.output, [onnx.ValueInfoProto(name=name) for name in outputs])
    for node in graph.node:
        node.output[:] = [f"{name}/made" if name in injected else name for name in node.output]
    known = {value.name for value in graph.input}
    for name, value in injected.items():
        if name not in known:
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            graph.input.append(helper.make_tensor_value_info(name, kind, [None] * value.ndim))
    weights = [tensor for tensor in graph.initializer if tensor.name not in injected]
    replace_items(graph.initializer, weights)
    prune(graph)
    return copy


def _gives(attention: Attention, values: Values, outputs: Values, batch: int) -> bool:
    """Whether the file gives of these values what the op does."""
    candidate, heads, channels = attention.candidate, attention.heads, attention.channels
    queries, points = attention.queries, sum(attention.level_points)
    if attention.value is None:
        maps = [values[level.value].reshape(batch, heads, channels, -1) for level in candidate.levels]
        value = np.concatenate(maps, 3).transpose(0, 3, 1, 2)
    else:
        value = values[attention.value].reshape(batch, -1, heads, channels)
    if attention.locations is None:
        grids = [values[level.grid].reshape(batch, heads, queries, -1, 2) for level in candidate.levels]
        locations = (np.concatenate(grids, 3).transpose(0, 2, 1, 3, 4) + 1) / 2
    else:
        locations = values[attention.locations].reshape(batch, queries, heads, points, 2)
    if attention.weights is None:
        weights = values[candidate.weights].reshape(batch, heads, queries, points).transpose(0, 2, 1, 3)
    else:
        weights = values[attention.weights].reshape(batch, queries, heads, points)
    result = outputs[attention.output]
    if attention.result is None:
        result = result.reshape(batch, heads * channels, queries).transpose(0, 2, 1)
    sides = [side for shape in attention.level_shapes for side in shape]
    computed = deformable_attention_definition(
        _tensor(value), _tensor(locations), _tensor(weights), sides, attention.level_points
    ).numpy()
    difference = np.abs(computed - result.reshape(computed.shape)).max()
    return bool(difference <= TOLERANCE * np.abs(computed).max())


def _tensor(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def _canonical(candidate: Candidate, seen: Mapping[str, Array], batch: int) -> _Canonical | None:
    values = [seen[level.value] for level in candidate.levels]
    grids = [seen[level.grid] for level in candidate.levels]
    weights, total = seen[candidate.weights], seen[candidate.total]
    if any(one.dtype != np.float32 for one in (*values, *grids, weights, total)):
        return None
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
        value=first(candidate.values, canonical.value),
        locations=first(candidate.locations, canonical.grid, lambda values: values * two - one),
        weights=first(candidate.weight_layouts, canonical.weights),
        result=first(candidate.results, canonical.result),
    )


def in_both(one: Attention | None, other: Attention | None) -> Attention | None:
    """What two runs agree on: names that hold in both; None where the attentions differ."""
    if one is None or other is None:
        return None

    def both(first: str | None, second: str | None) -> str | None:
        return first if first == second else None

    value, locations = both(one.value, other.value), both(one.locations, other.locations)
    weights, result = both(one.weights, other.weights), both(one.result, other.result)
    one, other = (
        replace(found, value=value, locations=locations, weights=weights, result=result) for found in (one, other)
    )
    return one if one == other else None
