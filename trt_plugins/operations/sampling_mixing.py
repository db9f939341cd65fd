"""SamplingMixing: 3D feature sampling and adaptive mixing of an AdaMixer layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from asag.trt_plugins.operations.description import (
    PYRAMID,
    STATIC_SHARED_LIMIT,
    STRIDES,
    Array,
    Attributes,
    Dimension,
    Layout,
    Operation,
    Shape,
    Tensor,
    Work,
    fixed,
    map_sizes,
    sample_maps,
)

ACTIVATIONS = ("gelu", "relu")
"""The attribute `activation` is a place in this tuple."""

_TAPS = 4
"""Neighbours of a sampling point on each level."""


def _output_shapes(shapes: Sequence[Shape], attributes: Attributes) -> list[list[Dimension]]:
    points = shapes[4]
    return [[points[0], points[1], shapes[0][1] * attributes["mixed_points"]]]


def _layout(shapes: Sequence[Shape], attributes: Attributes, element: str, tensor_cores: bool) -> Layout:
    points, mixed = shapes[4], attributes["mixed_points"]
    groups, count = fixed(points[2], "the number of groups"), fixed(points[3], "the number of points")
    channels = fixed(shapes[0][1], "the number of channels")
    if channels % groups:
        raise ValueError(f"SamplingMixing cannot share {channels} channels among {groups} groups")
    channels //= groups
    if channels % 8 or count % 8:
        raise ValueError(f"SamplingMixing needs multiples of 8: {channels} channels per group, {count} points")
    tiled = channels % 16 == 0 and count % 16 == 0 and mixed % 16 == 0
    use_cores = tensor_cores and element != "float32" and tiled
    threads = _tiled_threads(channels, count, mixed) if use_cores else _plain_threads(channels, count, mixed)
    if _shared_bytes(channels, count, mixed, threads, use_cores) > STATIC_SHARED_LIMIT:
        raise ValueError(
            f"SamplingMixing with {channels} channels per group, {count} points and {mixed} mixed points does not fit "
            "the shared memory of a block; use the op's ONNX body or smaller groups"
        )
    activation, unit = attributes["activation"], attributes["point_unit"]
    if not 0 <= activation < len(ACTIVATIONS) or unit < 1:
        raise ValueError(f"SamplingMixing has no activation {activation} with points in units of {unit} pixels")
    constants = {
        "GROUPS": groups,
        "CHANNELS": channels,
        "POINTS": count,
        "MIXED": mixed,
        "TENSOR_CORES": int(use_cores),
        "RELU": int(ACTIVATIONS[activation] == "relu"),
        "CELLS_PER_UNIT": f"{(unit / STRIDES[0]).hex()}f",
        "FIRST_LEVEL": f"{float(np.float32(math.log2(STRIDES[0] / unit))).hex()}f",
    }
    return Layout(constants, (points[1] * groups, points[0], 1), threads, (points[1], *map_sizes(shapes)))


def _plain_threads(channels: int, points: int, mixed: int) -> int:
    """Most threads, up to 256, that give each the same number of values in both products."""
    fits = [
        threads
        for threads in range(32, 257, 32)
        if threads % channels == 0 and points % (threads // channels) == 0 and mixed % (threads // channels) == 0
    ]
    if not fits:
        raise ValueError(f"SamplingMixing has no kernel for {channels} channels per group, {points} and {mixed} points")
    return fits[-1]


def _tiled_threads(channels: int, points: int, mixed: int) -> int:
    """Most warps, up to 8, that give each the same number of 16 x 8 tiles in both products."""
    small, large = points // 16 * channels // 8, mixed // 16 * channels // 8
    return 32 * max(warps for warps in range(1, 9) if small % warps == 0 and large % warps == 0)


def _shared_bytes(channels: int, points: int, mixed: int, threads: int, use_cores: bool) -> int:
    pad, size = (8, 2) if use_cores else (0, 4)
    parameters = channels * (channels + pad) + mixed * (points + pad)
    result = mixed * (channels + pad) if use_cores else 0
    return size * (points * (channels + pad) + max(parameters, result)) + points * 16 * 8 + 4 * threads // 32 * 4


def _work(shapes: Sequence[Sequence[int]], attributes: Attributes) -> Work:
    """Each point is sampled on each level; then the points times the channel matrix, the point matrix times that."""
    *maps, points, _ = shapes
    batch, queries, groups, count = points[:4]
    channels, mixed = maps[0][1] // groups, attributes["mixed_points"]
    taps = batch * queries * groups * count * channels * _TAPS
    products = batch * queries * groups * (count * channels * channels + mixed * count * channels)
    return Work(2.0 * (len(maps) * taps + products), sum(min(math.prod(shape), taps) for shape in maps))


def _sample(random: np.random.Generator, shapes: Sequence[Sequence[int]], attributes: Attributes) -> list[Array]:
    """Points as the decoder makes them: around a box of each query, on any level."""
    *maps, points, parameters = shapes
    unit = SAMPLING_MIXING.complete(attributes)["point_unit"]
    height, width = (side * STRIDES[0] for side in maps[0][2:])
    centres = random.random((*points[:2], 1, 1, 2)) * (width, height)
    extent = np.exp(random.uniform(np.log(16), np.log(400), (*points[:2], 1, 1, 1)))
    places = (centres + random.normal(size=(*points[:4], 2)) * extent / 2) / unit
    levels = random.uniform(-1, 4, (*points[:4], 1)) + math.log2(STRIDES[0] / unit)
    return [
        *sample_maps(random, maps),
        np.concatenate((places, levels), axis=-1).astype(np.float32),
        random.standard_normal(tuple(parameters), np.float32),
    ]


SAMPLING_MIXING = Operation(
    name="SamplingMixing",
    snake_name="sampling_mixing",
    inputs=(*PYRAMID, Tensor("points", "float32"), Tensor("parameters", "element")),
    outputs=(Tensor("mixed", "element"),),
    attributes=(("mixed_points", int), ("activation", int), ("point_unit", int)),
    output_shapes=_output_shapes,
    layout=_layout,
    sample=_sample,
    work=_work,
    half_inputs=(0, 1, 2, 3, 5),
    defaults={"activation": ACTIVATIONS.index("gelu"), "point_unit": STRIDES[0]},
)
