"""The kernels at the sizes that matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asag.trt_plugins.operations import DOMAIN, OPERATIONS, Tensor
from asag.trt_plugins.plan import Plan, make_plan


@dataclass(frozen=True)
class Sizes:
    """What decides the shapes of the ops in a detector of each family."""

    name: str
    channels: int
    finest: tuple[int, int]
    """Height and width of P2 in cells."""
    first: int
    """Anchors of P5 and P6."""
    anchors_per_patch: int
    capacity: tuple[int, int]
    """Patches per image on P4 and P3."""
    keep_threshold: float
    fewest: int
    queries: int
    groups: int
    points: int
    mixed_points: int

    @property
    def maps(self) -> tuple[tuple[int, int, int], ...]:
        """(channels, height, width) of P2..P5; each level is half as large, rounded up."""
        height, width = self.finest
        return tuple((self.channels, -(-height // 2**level), -(-width // 2**level)) for level in range(4))

    @property
    def attended(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the levels that deformable attention reads, at strides 8, 16, 32 and 64."""
        height, width = self.finest
        return tuple((-(-height // 2**level), -(-width // 2**level)) for level in range(1, 5))

    @property
    def tokens(self) -> int:
        """Cells of these levels together."""
        return sum(height * width for height, width in self.attended)


PUBLISHED = Sizes("published", 256, (200, 336), 750, 50, (64, 128), 0.05, 50, 300, 4, 32, 128)
"""The published detectors of about 300 queries, with as many places, on inputs of 800 x 1344 pixels."""

DEMO = Sizes("demo", 64, (80, 80), 100, 10, (16, 32), 0.1, 5, 100, 4, 16, 32)
"""The small detector of `asag demo`."""


HEADS, POINTS = 8, 4
"""Of deformable attention: heads, and a head's points on each level."""

KEPT = 0.1
"""Share of the tokens that a sparse encoder refines."""

PLACES = {
    "AdaptiveProbing": ("P4", "P3"),
    "GatherAnchors": ("",),
    "PyramidRoIAlign": ("",),
    "SamplingMixing": ("",),
    "MultiScaleDeformableAttention": ("decoder", "sparse encoder", "encoder"),
    "SelectTokens": ("",),
    "SampleGrid": ("",),
}
"""The ops of these detectors, and where they run: on which levels, or in which part."""


@dataclass(frozen=True)
class Case:
    """An op with shapes, attributes, types and layout."""

    name: str
    sizes: Sizes
    shapes: Sequence[Sequence[int]]
    attributes: Mapping[str, Any]
    element: str = "float32"
    channels_last: bool = False
    tensor_cores: bool = False
    part: str = ""
    """One of :data:`PLACES`."""

    @property
    def kind(self) -> str:
        """The part, type and layout in words."""
        extras = ", channels-last" * self.channels_last + ", tensor cores" * self.tensor_cores
        return f"{self.part} {self.element}".strip() + extras

    @property
    def place(self) -> str:
        """Op, part, size, batch and type in words."""
        part = f" {self.part}" if self.part else ""
        queries = f", {self.queries} queries" if self.name not in ("AdaptiveProbing", "SelectTokens") else ""
        return f"{self.name}{part}, {self.sizes.name}{queries}, batch {self.batch}, {self.element}"

    @property
    def queries(self) -> int:
        """Queries of an image."""
        return int(self.shapes[1][1]) if self.name == "MultiScaleDeformableAttention" else self.sizes.queries

    @property
    def batch(self) -> int:
        """Images per launch."""
        return int(self.shapes[0][0])

    def plan(self) -> Plan:
        """How to compile and launch it."""
        return make_plan(self.name, self.shapes, self.attributes, self.element, self.channels_last, self.tensor_cores)


def signature(name: str, sizes: Sizes, batch: int = 1, part: str = "") -> tuple[list[tuple[int, ...]], dict[str, Any]]:
    """Shapes of an op's inputs, and its attributes, in a detector of `sizes`; part: one of :data:`PLACES`, the first
    unless given.
    """
    part = part or PLACES[name][0]
    maps = [(batch, *shape) for shape in sizes.maps]
    if name == "AdaptiveProbing":
        coarse = part == "P4"
        count = sizes.first if coarse else sizes.capacity[0] * sizes.anchors_per_patch
        shapes = [(batch, count, 5), (batch, count), (batch, 8, *maps[2 if coarse else 1][2:]), (batch, 2)]
        return shapes, {"stride": 16 if coarse else 8, "capacity": sizes.capacity[0 if coarse else 1]}
    if name == "GatherAnchors":
        count = sizes.first + sum(sizes.capacity) * sizes.anchors_per_patch
        attributes = {
            "first": sizes.first,
            "keep_threshold": sizes.keep_threshold,
            "fewest": sizes.fewest,
            "most": sizes.queries,
        }
        return [(batch, count, 5), (batch, count)], attributes
    kept = int(sizes.tokens * KEPT) + 1
    plain: dict[str, tuple[list[tuple[int, ...]], dict[str, Any]]] = {
        "PyramidRoIAlign": ([*maps, (batch, sizes.queries, 4)], {}),
        "SelectTokens": ([(batch, sizes.tokens), (batch,)], {"capacity": kept}),
        "SampleGrid": ([maps[1], (batch, sizes.queries, POINTS, 2)], {"padding": 0, "align_corners": 0}),
    }
    if name in plain:
        return plain[name]
    if name == "MultiScaleDeformableAttention":
        queries = {"decoder": sizes.queries, "sparse encoder": kept, "encoder": sizes.tokens}[part]
        weights = (batch, queries, HEADS, POINTS * len(sizes.attended))
        sides = tuple(side for shape in sizes.attended for side in shape)
        levels = {"level_shapes": sides, "level_points": (POINTS,) * len(sizes.attended)}
        return [(batch, sizes.tokens, HEADS, sizes.channels // HEADS), (*weights, 2), weights], levels
    width = sizes.channels // sizes.groups
    parameters = sizes.groups * (width * width + sizes.mixed_points * sizes.points)
    points = (batch, sizes.queries, sizes.groups, sizes.points, 3)
    return [*maps, points, (batch, sizes.queries, parameters)], {"mixed_points": sizes.mixed_points}


def cases(sizes: Sizes, batch: int = 1) -> Iterator[Case]:
    """Every op that these detectors have, in every type and layout that has a kernel."""
    for name, parts in PLACES.items():
        operation = OPERATIONS[name]
        for part in parts:
            shapes, attributes = signature(name, sizes, batch, part)
            for element in operation.elements:
                for channels_last in (False, True) if operation.maps else (False,):
                    has_cores = name == "SamplingMixing" and element != "float32"
                    for tensor_cores in (False, True) if has_cores else (False,):
                        yield Case(name, sizes, shapes, attributes, element, channels_last, tensor_cores, part)


def op_model(
    name: str, shapes: Sequence[Sequence[int]], attributes: Mapping[str, Any], element: str = "float32"
) -> bytes:
    """A serialized ONNX model of one op's node with its body; `element` ("float32" or "float16") is the maps' type."""
    from onnx import TensorProto, helper

    from asag.export.op_bodies import bodies_of
    from asag.export.op_bodies.domain import DOMAIN_VERSION, OPSET_VERSION

    operation = OPERATIONS[name]
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bool": TensorProto.BOOL}
    types |= {"int32": TensorProto.INT32, "int64": TensorProto.INT64}

    def describe_values(tensors: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(tensor.name, types[tensor.resolve(element)], size)
            for tensor, size in zip(tensors, sizes, strict=True)
        ]

    inputs = describe_values(operation.inputs, shapes)
    outputs = describe_values(operation.outputs, operation.output_shapes(shapes, attributes))
    names = [value.name for value in inputs], [value.name for value in outputs]
    node = helper.make_node(name, names[0], names[1], domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], name, inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET_VERSION), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = helper.make_model(graph, functions=bodies_of([node]), opset_imports=opsets, ir_version=10)
    return model.SerializeToString()
