"""How to compile and launch an op's kernel for given types and shapes; launching and the plugins ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asag.trt_plugins.operations import ELEMENT_TYPES, OPERATIONS, Operation
from asag.trt_plugins.operations.description import Dimension, Shape


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
        """Name of the entry point and, with `.cu`, of its file."""
        return self.operation.snake_name


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
    if channels_last and not operation.maps:
        raise ValueError(f"{name} has no channels-last kernel")
    if len(shapes) != len(operation.inputs):
        raise ValueError(f"{name} has {len(operation.inputs)} inputs, not {len(shapes)}")
    layout = operation.layout(shapes, operation.complete(attributes), element, tensor_cores)
    constants: dict[str, str | int] = {**layout.constants, "THREADS": layout.threads}
    if any(tensor.type == "element" for tensor in operation.inputs):
        constants["ELEMENT"] = ELEMENT_TYPES[element]
    if operation.maps:
        constants["CHANNELS_LAST"] = int(channels_last)
    defines = tuple((key, str(value)) for key, value in sorted(constants.items()))
    return Plan(operation, element, channels_last, defines, layout.grid, layout.threads, layout.scalars)
