"""What each custom op is to a kernel: tensors, compile-time constants, grid, block and scalar arguments.

This is the only place that knows. Launching, the plugins, the tests and the benchmark all ask :func:`make_plan`.
Dimensions are integers or, inside TensorRT, symbolic expressions; the same arithmetic serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PATCH_SIDE = 15
"""Cells along the side of a probed patch."""

ROI_SIDE = 7
ELEMENT_TYPES = {"float32": "float", "float16": "Half", "bfloat16": "BFloat16"}
"""Types of feature maps, and their names in the kernels."""

STATIC_SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory that a block may declare on every GPU."""

# An integer, or an object of TensorRT that has +, * and // and knows whether it is constant.
Dimension = Any
Shape = Sequence[Dimension]


@dataclass(frozen=True)
class Tensor:
    """One input or output of an op."""

    name: str
    type: str
    """A type's name, or "element" for the type of the feature maps."""
    pyramid: bool = False
    """A feature map [B, C, H, W] that may lie channels-last."""

    def resolve(self, element: str) -> str:
        """The type's name where feature maps have type `element`."""
        return element if self.type == "element" else self.type


@dataclass(frozen=True)
class Operation:
    """Signature of a custom op; names and order are those of the op's definition and ONNX node."""

    name: str
    kernel: str
    """Name of the kernel and, with `.cu`, of its file."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: tuple[tuple[str, type], ...]
    output_shapes: Callable[[Sequence[Shape], Mapping[str, Any]], list[list[Dimension]]]
    layout: Callable[..., _Layout]

    @property
    def elements(self) -> tuple[str, ...]:
        """Types that the feature maps may have; without feature maps only float32."""
        has_element = any(tensor.type == "element" for tensor in self.inputs)
        return tuple(ELEMENT_TYPES) if has_element else ("float32",)

    @property
    def has_pyramid(self) -> bool:
        """Whether feature maps may lie channels-last."""
        return any(tensor.pyramid for tensor in self.inputs)


@dataclass(frozen=True)
class _Layout:
    constants: Mapping[str, str | int]
    grid: tuple[Dimension, Dimension, Dimension]
    threads: int
    scalars: tuple[Dimension, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A kernel made for one combination of types, constants and shapes, and how to launch it.

    Arguments of the kernel: pointers of the inputs, `scalars` (int32), pointers of the outputs.
    """

    operation: Operation
    element: str
    """Type of the feature maps."""
    channels_last: bool
    """Whether P2..P5 lie as [B, H, W, C]."""
    defines: tuple[tuple[str, str], ...]
    """Compile-time constants, the kernel's macros."""
    grid: tuple[Dimension, Dimension, Dimension]
    threads: int
    """Threads per block, along x."""
    scalars: tuple[Dimension, ...]

    @property
    def kernel(self) -> str:
        """Name of the entry point."""
        return self.operation.kernel

    shared_bytes: int = 0
    """Dynamic shared memory; what the kernels need is declared in them."""


def make_plan(
    name: str,
    shapes: Sequence[Shape],
    attributes: Mapping[str, Any],
    element: str = "float32",
    channels_last: bool = False,
    tensor_cores: bool = False,
) -> Plan:
    """How to compile and launch op `name` for inputs of `shapes`.

    element: type of the feature maps, a key of :data:`ELEMENT_TYPES`; channels_last: P2..P5 lie as [B, H, W, C];
    tensor_cores: use them where shapes allow, for 16-bit elements on compute capability 8.0 and later.
    Raises ValueError for what the kernel cannot do, such as a number of channels that is not fixed.
    """
    operation = OPERATIONS[name]
    if element not in operation.elements:
        raise ValueError(f"{name} has no kernel for {element}; it has {', '.join(operation.elements)}")
    if channels_last and not operation.has_pyramid:
        raise ValueError(f"{name} has no channels-last kernel")
    if len(shapes) != len(operation.inputs):
        raise ValueError(f"{name} has {len(operation.inputs)} inputs, not {len(shapes)}")
    layout = operation.layout(shapes, dict(attributes), element, tensor_cores)
    constants: dict[str, str | int] = {**layout.constants, "THREADS": layout.threads}
    if any(tensor.type == "element" for tensor in operation.inputs):
        constants["ELEMENT"] = ELEMENT_TYPES[element]
    if operation.has_pyramid:
        constants["CHANNELS_LAST"] = int(channels_last)
    defines = tuple((key, str(value)) for key, value in sorted(constants.items()))
    return Plan(operation, element, channels_last, defines, layout.grid, layout.threads, layout.scalars)


def _fixed(dimension: Dimension, what: str) -> int:
    """A dimension that is compiled into the kernel."""
    if isinstance(dimension, int | np.integer):
        return int(dimension)
    if not dimension.is_constant:
        raise ValueError(f"{what} must be fixed in the model: it is compiled into the kernel")
    return int(dimension.constant_value())


def _threads_for(items: int, per_thread: int) -> int:
    """A number of threads, whole warps, for `items` at about `per_thread` each."""
    return min(1024, max(128, -(-items // (32 * per_thread)) * 32))


def _probing_layout(shapes: Sequence[Shape], attributes: dict[str, Any], element: str, tensor_cores: bool) -> _Layout:
    anchors, _, feature, _ = shapes
    count = _fixed(anchors[1], "the number of anchors")
    slices = min(8, attributes["capacity"])
    constants = {
        "ANCHORS": count,
        "CHANNELS": _fixed(feature[1], "the number of channels"),
        "STRIDE": attributes["stride"],
        "CAPACITY": attributes["capacity"],
        "SLICES": slices,
    }
    threads = min(512, _threads_for(count, 2))
    if 8 * count + 4 * threads + 8 * (attributes["capacity"] + threads // 32) + 12 > STATIC_SHARED_LIMIT:
        raise ValueError(
            f"AdaptiveProbing of {count} anchors does not fit the shared memory of a block; use the op's ONNX body or "
            "fewer patches"
        )
    return _Layout(constants, (slices, anchors[0], 1), threads, (feature[2], feature[3]))


def _probing_outputs(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[list[Dimension]]:
    anchors, _, feature, _ = shapes
    batch, places = anchors[0], attributes["capacity"]
    return [
        [batch, places, PATCH_SIDE**2, feature[1]],
        [batch, places, 2],
        [batch, places],
        [batch, anchors[1]],
        [batch],
    ]


def _gather_layout(shapes: Sequence[Shape], attributes: dict[str, Any], element: str, tensor_cores: bool) -> _Layout:
    anchors = shapes[0]
    count = _fixed(anchors[1], "the number of anchors")
    constants = {
        "ANCHORS": count,
        "FIRST": attributes["first"],
        "KEEP_THRESHOLD": f"{float(np.float32(attributes['keep_threshold'])).hex()}f",
        "FEWEST": attributes["fewest"],
        "MOST": attributes["most"],
    }
    return _Layout(constants, (anchors[0], 1, 1), _threads_for(count, 1))


def _gather_outputs(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[list[Dimension]]:
    batch = shapes[0][0]
    return [[batch, attributes["most"], 4], [batch, attributes["most"]]]


def _map_sizes(shapes: Sequence[Shape]) -> tuple[Dimension, ...]:
    return tuple(side for shape in shapes[:4] for side in (shape[2], shape[3]))


def _align_layout(shapes: Sequence[Shape], attributes: dict[str, Any], element: str, tensor_cores: bool) -> _Layout:
    channels, boxes = _fixed(shapes[0][1], "the number of channels"), shapes[4]
    chunk = max(size for size in range(1, 65) if channels % size == 0)
    constants = {"CHANNELS": channels, "CHUNK": chunk}
    return _Layout(constants, (channels // chunk, boxes[1], boxes[0]), 256, (boxes[1], *_map_sizes(shapes)))


def _align_outputs(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[list[Dimension]]:
    boxes = shapes[4]
    return [[boxes[0], boxes[1], shapes[0][1], ROI_SIDE, ROI_SIDE]]


def _mixing_layout(shapes: Sequence[Shape], attributes: dict[str, Any], element: str, tensor_cores: bool) -> _Layout:
    points, mixed = shapes[4], attributes["mixed_points"]
    groups, count = _fixed(points[2], "the number of groups"), _fixed(points[3], "the number of points")
    channels = _fixed(shapes[0][1], "the number of channels")
    if channels % groups:
        raise ValueError(f"SamplingMixing cannot share {channels} channels among {groups} groups")
    channels //= groups
    if channels % 8 or count % 8:
        raise ValueError(f"SamplingMixing needs multiples of 8: {channels} channels per group, {count} points")
    tiled = channels % 16 == 0 and count % 16 == 0 and mixed % 16 == 0
    use_cores = tensor_cores and element != "float32" and tiled
    threads = _tiled_threads(channels, count, mixed) if use_cores else _plain_threads(channels, count, mixed)
    if _mixing_shared_bytes(channels, count, mixed, threads, use_cores) > STATIC_SHARED_LIMIT:
        raise ValueError(
            f"SamplingMixing with {channels} channels per group, {count} points and {mixed} mixed points does not fit "
            "the shared memory of a block; use the op's ONNX body or smaller groups"
        )
    constants = {
        "GROUPS": groups,
        "CHANNELS": channels,
        "POINTS": count,
        "MIXED": mixed,
        "TENSOR_CORES": int(use_cores),
    }
    return _Layout(constants, (points[1] * groups, points[0], 1), threads, (points[1], *_map_sizes(shapes)))


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


def _mixing_shared_bytes(channels: int, points: int, mixed: int, threads: int, use_cores: bool) -> int:
    pad, size = (8, 2) if use_cores else (0, 4)
    parameters = channels * (channels + pad) + mixed * (points + pad)
    result = mixed * (channels + pad) if use_cores else 0
    return size * (points * (channels + pad) + max(parameters, result)) + points * 16 * 8 + 4 * threads // 32 * 4


def _mixing_outputs(shapes: Sequence[Shape], attributes: Mapping[str, Any]) -> list[list[Dimension]]:
    points = shapes[4]
    return [[points[0], points[1], shapes[0][1] * attributes["mixed_points"]]]


_PYRAMID = tuple(Tensor(f"p{level}", "element", pyramid=True) for level in (2, 3, 4, 5))

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            name="AdaptiveProbing",
            kernel="adaptive_probing",
            inputs=(
                Tensor("anchors", "float32"),
                Tensor("valid", "bool"),
                Tensor("feature", "element"),
                Tensor("sizes", "float32"),
            ),
            outputs=(
                Tensor("patches", "element"),
                Tensor("corners", "int64"),
                Tensor("taken", "bool"),
                Tensor("candidate", "bool"),
                Tensor("overflow", "int32"),
            ),
            attributes=(("stride", int), ("capacity", int)),
            output_shapes=_probing_outputs,
            layout=_probing_layout,
        ),
        Operation(
            name="GatherAnchors",
            kernel="gather_anchors",
            inputs=(Tensor("anchors", "float32"), Tensor("selectable", "bool")),
            outputs=(Tensor("boxes", "float32"), Tensor("valid", "bool")),
            attributes=(("first", int), ("keep_threshold", float), ("fewest", int), ("most", int)),
            output_shapes=_gather_outputs,
            layout=_gather_layout,
        ),
        Operation(
            name="PyramidRoIAlign",
            kernel="pyramid_roi_align",
            inputs=(*_PYRAMID, Tensor("boxes", "float32")),
            outputs=(Tensor("rois", "element"),),
            attributes=(),
            output_shapes=_align_outputs,
            layout=_align_layout,
        ),
        Operation(
            name="SamplingMixing",
            kernel="sampling_mixing",
            inputs=(*_PYRAMID, Tensor("points", "float32"), Tensor("parameters", "element")),
            outputs=(Tensor("mixed", "element"),),
            attributes=(("mixed_points", int),),
            output_shapes=_mixing_outputs,
            layout=_mixing_layout,
        ),
    )
}
"""The custom ops of domain `asag`, by the names of their ONNX nodes."""
