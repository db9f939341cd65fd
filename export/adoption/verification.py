"""Which candidates are deformable attention, found by running the file.

First the file runs on a picture. What an attention reads and gives is worked out from the GridSamples' inputs, the
weights and the sum that the file computes, in the order of axes that the op has; a value of the file with the same
numbers bit for bit is proposed as the same value laid out otherwise. Then what the file does between these values runs
alone, of random numbers, and must give what the op gives of them: so nothing depends on what the pictures happened
to be, and values whose numbers repeat are told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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


@dataclass(frozen=True)
class Occasion:
    """A run of a file: what it was fed, of so many images; the shapes that its values then have; and what its Shape
    nodes gave.
    """

    batch: int
    feeds: Values
    shapes: Mapping[str, tuple[int, ...]]
    asked: Values


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


def asked_shapes(graph: onnx.GraphProto) -> tuple[str, ...]:
    """The values of a graph that are the shape of another."""
    return tuple(node.output[0] for node in graph.node if node.op_type == "Shape")


def confirm(proto: onnx.ModelProto, proposed: Iterable[Attention], occasion: Occasion) -> tuple[Attention, ...]:
    """Those of the proposed attentions of a file that give what the op gives, of random numbers.

    One that does not is tried again with its inputs and result where they surely lie, at its GridSamples and its sum.
    """
    confirmed = []
    for one in proposed:
        surely = replace(one, value=None, locations=None, weights=None, result=None)
        confirmed.append(next((attempt for attempt in (one, surely) if _computes(proto, attempt, occasion)), None))
    return tuple(one for one in confirmed if one is not None)


def _computes(proto: onnx.ModelProto, attention: Attention, occasion: Occasion) -> bool:
    """Whether an attention of a file gives what the op gives."""
    random = np.random.default_rng(0)
    shapes = {name: occasion.shapes[name] for name in attention.inputs}
    values = {name: random.uniform(-1.2, 1.2, shape).astype(np.float32) for name, shape in shapes.items()}
    injected = {**occasion.asked, **values}
    run = FileRun(_cut(proto, injected, attention.output), optimized=False)
    result = run.run({**occasion.feeds, **injected})[attention.output]
    return _gives(attention, values, result, occasion.batch)


def _cut(proto: onnx.ModelProto, injected: Values, output: str) -> onnx.ModelProto:
    """A copy of a file that takes some of its values as inputs and gives another.

    Among them are the shapes that it asks for, or all that stands before a value would be computed for its shape.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    replace_items(graph.output, [onnx.ValueInfoProto(name=output)])
    for node in graph.node:
        node.output[:] = [f"{name}/made" if name in injected else name for name in node.output]
    known = {value.name for value in graph.input}
    for name, value in injected.items():
        if name not in known:
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            graph.input.append(helper.make_tensor_value_info(name, kind, value.shape))
    weights = [tensor for tensor in graph.initializer if tensor.name not in injected]
    replace_items(graph.initializer, weights)
    prune(graph)
    return copy


def _gives(attention: Attention, values: Values, result: Array, batch: int) -> bool:
    """Whether a result is what the op gives of these values."""
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
