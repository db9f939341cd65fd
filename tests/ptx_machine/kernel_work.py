"""What one launch of each kernel makes a GPU do, counted on its PTX: `python -m tests.ptx_machine.kernel_work`.

Sizes are those of the published detectors, with fewer queries where a block serves one, because all blocks do the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from asag.trt_plugins.operations import OPERATIONS
from benchmarks.kernel_cases import PUBLISHED, Case, cases
from tests.ptx_machine.launch import run_ptx
from tests.ptx_machine.work import Work
from tests.trt_plugins.kernel_cases import to_element

QUERIES = 2


@dataclass(frozen=True)
class Counted:
    """The work of one case, on average over its blocks."""

    case: Case
    warps: int
    """Of a block."""
    instructions: float
    """PTX instructions per warp."""
    sectors: float
    """32 bytes of global memory each, per block."""
    extra_sectors: float
    """Sectors for each that the same bytes would fill side by side."""
    extra_passes: float
    """Passes through shared memory for each that would do without bank conflicts."""


def count(case: Case, capability: int = 90) -> Counted:
    """Run a case and count."""
    arrays = OPERATIONS[case.name].sample(np.random.default_rng(0), case.shapes, case.attributes)
    inputs = [
        to_element(array, case.element) if tensor.type == "element" else array
        for tensor, array in zip(OPERATIONS[case.name].inputs, arrays, strict=True)
    ]
    work, plan = Work(), case.plan()
    layout = case.element, case.channels_last, case.tensor_cores
    run_ptx(case.name, inputs, case.attributes, *layout, capability, work)
    blocks, warps = int(np.prod(plan.grid)), plan.threads // 32
    return Counted(
        case,
        warps,
        sum(work.instructions.values()) / blocks / warps,
        work.sectors / blocks,
        work.sectors / work.fewest_sectors,
        work.passes / work.fewest_passes,
    )


def counted_cases() -> Iterator[Case]:
    """Every kernel that a GPU of compute capability 8.0 or later runs, bfloat16 aside: it does what float16 does."""
    for case in cases(replace(PUBLISHED, queries=QUERIES)):
        full = next(other for other in cases(PUBLISHED) if (other.name, other.kind) == (case.name, case.kind))
        # The encoders' blocks do what the decoder's do.
        if "encoder" in case.part:
            continue
        plain_half = case.name == "SamplingMixing" and case.element == "float16" and not case.tensor_cores
        if case.element != "bfloat16" and not plain_half:
            yield full if case.name in ("AdaptiveProbing", "GatherAnchors", "SelectTokens") else case


def main() -> None:
    heads = ("op", "kind", "warps", "instructions per warp", "sectors per block", "of the fewest")
    print(f"| {' | '.join(heads)} | shared passes of the fewest |")
    print("|" + " --- |" * 7)
    for case in counted_cases():
        found = count(case)
        cells = [f"{found.instructions:.0f}", f"{found.sectors:.0f}", f"{found.extra_sectors:.2f}x"]
        print(f"| {case.name} | {case.kind} | {found.warps} | {' | '.join(cells)} | {found.extra_passes:.2f}x |")


if __name__ == "__main__":
    sys.exit(main())
