"""What a custom op is: tensors, attributes, shapes, work, and the layout of its kernel's launch.

Dimensions are integers or, inside TensorRT, symbolic expressions; the same arithmetic serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

DOMAIN = "asag"
"""Of the ops in PyTorch and ONNX, and the namespace of the plugins in TensorRT."""

STRIDES = (4, 8, 16, 32)
"""Pixels of the input from one cell to the next, of P2..P5."""

ELEMENT_TYPES = {"float32": "float", "float16": "Half", "bfloat16": "BFloat16"}
"""Types of feature maps, and their names in the kernels."""

STATIC_SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory that a block may declare on every GPU."""

# An integer, or an object of TensorRT that has +, * and // and knows whether it is constant.
Dimension = Any
Shape = Sequence[Dimension]
Attributes = Mapping[str, Any]
Array = NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """One input or output of an op."""

    name: str
    type: str
    """A type's name, or "element" for the type of the feature maps."""
    pyramid: bool = False
    """A feature map [B, C, H, W] that may lie channels-last; it is sampled, too."""
    sampled: bool = False
    """Whether it is read in places only."""

    def resolve(self, element: str) -> str:
        """The type's name where feature maps have type `element`."""
        return element if self.type == "element" else self.type


@dataclass(frozen=True)
class Layout:
    """How a kernel is compiled and launched; `scalars` are its int32 arguments, `constants` its macros."""

    constants: Mapping[str, str | int]
    grid: tuple[Dimension, Dimension, Dimension]
    threads: int
    """Per block, along x."""
    scalars: tuple[Dimension, ...] = ()


@dataclass(frozen=True)
class Work:
    """What an op has to do: floating-point operations, two for each multiply-add, and values that it reads at most of
    the inputs of :attr:`Operation.sampled`.
    """

    operations: float = 0.0
    map_values: float = 0.0


@dataclass(frozen=True)
class Operation:
    """A custom op. Names and order of inputs and attributes are those of its definition and its ONNX node."""

    name: str
    """Of the ONNX node, its body and the plugin."""
    snake_name: str
    """Of PyTorch's op, the module that defines it (in `asag.ops`), that of its body (in `export.op_bodies`), and the
    kernel with its file; `<snake_name>_definition` is the definition."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: tuple[tuple[str, type], ...]
    """Names and types: int, float, or tuple for whole numbers of any count."""
    output_shapes: Callable[[Sequence[Shape], Attributes], list[list[Dimension]]]
    layout: Callable[[Sequence[Shape], Attributes, str, bool], Layout]
    """Of shapes, attributes, the maps' type and whether there are tensor cores; ValueError for what has no kernel."""
    sample: Callable[[np.random.Generator, Sequence[Sequence[int]], Attributes], list[Array]]
    """Inputs of given shapes as a detector makes them; what is of the maps' type comes in float32."""
    work: Callable[[Sequence[Sequence[int]], Attributes], Work] = lambda shapes, attributes: Work()
    half_inputs: tuple[int, ...] = ()
    """Positions of the inputs that a model of half precision gives in 16 bits."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What attributes are that a node does not have: files from before there were these attributes mean this."""

    def complete(self, attributes: Attributes) -> dict[str, Any]:
        """The op's attributes in order, those that are not given with their defaults, lists as tuples.

        Raises ValueError where one has no default.
        """
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in attributes.items()}
        known = {**self.defaults, **known}
        missing = [name for name, _ in self.attributes if name not in known]
        if missing:
            raise ValueError(f"{self.name} needs the attributes {', '.join(missing)}")
        return {name: known[name] for name, _ in self.attributes}

    @property
    def elements(self) -> tuple[str, ...]:
        """Types that the feature maps may have; without feature maps only float32."""
        has_element = any(tensor.type == "element" for tensor in self.inputs)
        return tuple(ELEMENT_TYPES) if has_element else ("float32",)

    @property
    def maps(self) -> int:
        """How many of the first inputs are feature maps that may lie channels-last."""
        return sum(tensor.pyramid for tensor in self.inputs)

    @property
    def sampled(self) -> int:
        """How many of the first inputs are read in places only."""
        return sum(tensor.pyramid or tensor.sampled for tensor in self.inputs)

    def types(self, element: str) -> list[str]:
        """Types of the inputs where feature maps have type `element`."""
        return [tensor.resolve(element) for tensor in self.inputs]


PYRAMID = tuple(Tensor(f"p{level}", "element", pyramid=True) for level in (2, 3, 4, 5))
"""The first inputs of an op that reads all levels."""


def fixed(dimension: Dimension, what: str) -> int:
    """A dimension that is compiled into the kernel. Raises ValueError where the model leaves it open."""
    if isinstance(dimension, int | np.integer):
        return int(dimension)
    if not dimension.is_constant:
        raise ValueError(f"{what} must be fixed in the model: it is compiled into the kernel")
    return int(dimension.constant_value())


def threads_for(items: int, per_thread: int) -> int:
    """A number of threads, whole warps, for `items` at about `per_thread` each."""
    return min(1024, max(128, -(-items // (32 * per_thread)) * 32))


def map_sizes(shapes: Sequence[Shape]) -> tuple[Dimension, ...]:
    """Height and width of P2..P5, which come first."""
    return tuple(side for shape in shapes[: len(PYRAMID)] for side in (shape[2], shape[3]))


def sample_maps(random: np.random.Generator, shapes: Sequence[Sequence[int]]) -> list[Array]:
    """Feature maps of these shapes."""
    return [random.standard_normal(tuple(shape), np.float32) for shape in shapes]


def sample_anchors(random: np.random.Generator, shape: Sequence[int], height: float, width: float) -> Array:
    """Anchors [B, A, 5] spread over an input of this size: cx, cy, w, h in pixels, confidence."""
    batch_and_count = tuple(shape[:2])
    centres = random.random((*batch_and_count, 2)) * (width, height)
    sides = random.uniform(2, 100, (*batch_and_count, 2))
    confidence = random.random((*batch_and_count, 1))
    return np.concatenate((centres, sides, confidence), axis=-1).astype(np.float32)
