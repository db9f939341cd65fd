"""The kernels at the sizes that matter, and what each takes of a GPU: `python -m trt_plugins.resources`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trt_plugins.compile import (
    ARCHITECTURES,
    FIRST_WITH_TENSOR_CORES,
    nvrtc_version,
    resource_usage,
    supported_capabilities,
)
from trt_plugins.operations import OPERATIONS
from trt_plugins.plan import Plan, make_plan


@dataclass(frozen=True)
class Sizes:
    """What decides the shapes of the ops in one detector."""

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


PUBLISHED = Sizes("published", 256, (200, 336), 750, 50, (64, 128), 0.05, 50, 300, 4, 32, 128)
"""The published detectors of about 300 queries, with as many places, on inputs of 800 x 1344 pixels."""

DEMO = Sizes("demo", 64, (80, 80), 100, 10, (16, 32), 0.1, 5, 100, 4, 16, 32)
"""The small detector of `asag demo`."""


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
    level: str = ""
    """The probed level, for AdaptiveProbing."""

    @property
    def kind(self) -> str:
        """The level, type and layout in words."""
        extras = ", channels-last" * self.channels_last + ", tensor cores" * self.tensor_cores
        return f"{self.level} {self.element}".strip() + extras

    def plan(self) -> Plan:
        """How to compile and launch it."""
        return make_plan(self.name, self.shapes, self.attributes, self.element, self.channels_last, self.tensor_cores)


def signature(
    name: str, sizes: Sizes, batch: int = 1, level: str = "P4"
) -> tuple[list[tuple[int, ...]], dict[str, Any]]:
    """Shapes of an op's inputs, and its attributes, in a detector of `sizes`; level: P4 or P3, for AdaptiveProbing."""
    maps = [(batch, *shape) for shape in sizes.maps]
    if name == "AdaptiveProbing":
        coarse = level == "P4"
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
    if name == "PyramidRoIAlign":
        return [*maps, (batch, sizes.queries, 4)], {}
    width = sizes.channels // sizes.groups
    parameters = sizes.groups * (width * width + sizes.mixed_points * sizes.points)
    points = (batch, sizes.queries, sizes.groups, sizes.points, 3)
    return [*maps, points, (batch, sizes.queries, parameters)], {"mixed_points": sizes.mixed_points}


def cases(sizes: Sizes, batch: int = 1) -> Iterator[Case]:
    """Every op in every type and layout that has a kernel."""
    for name, operation in OPERATIONS.items():
        for level in ("P4", "P3") if name == "AdaptiveProbing" else ("",):
            shapes, attributes = signature(name, sizes, batch, level)
            for element in operation.elements:
                for channels_last in (False, True) if operation.maps else (False,):
                    has_cores = name == "SamplingMixing" and element != "float32"
                    for tensor_cores in (False, True) if has_cores else (False,):
                        yield Case(name, sizes, shapes, attributes, element, channels_last, tensor_cores, level)


def resource_rows(sizes: Sizes, capabilities: Sequence[int]) -> Iterator[list[str]]:
    """Per case: op, kind, threads per block, shared bytes, and per capability registers with spilled bytes, if any."""
    for case in cases(sizes):
        plan, registers, shared = case.plan(), [], 0
        for capability in capabilities:
            if case.tensor_cores and capability < FIRST_WITH_TENSOR_CORES:
                registers.append("-")
                continue
            usage = resource_usage(plan, capability)
            shared = max(shared, usage.shared_bytes)
            registers.append(f"{usage.registers}" + f" (spills {usage.spill_bytes} B)" * (usage.spill_bytes > 0))
        yield [case.name, case.kind, str(plan.threads), str(shared), *registers]


def main() -> None:
    """Print the table for all architectures that the installed compiler knows."""
    capabilities = [capability for capability in ARCHITECTURES if capability in supported_capabilities()]
    for sizes in (PUBLISHED, DEMO):
        print(f"Sizes: {sizes.name}; NVRTC {nvrtc_version()}; registers per thread by architecture.\n")
        heads = ["op", "kind", "threads", "shared bytes", *(f"sm_{capability}" for capability in capabilities)]
        for row in (heads, ["---"] * len(heads), *resource_rows(sizes, capabilities)):
            print("| " + " | ".join(row) + " |")
        print()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
