"""What each kernel takes of a GPU, by architecture: `python -m benchmarks.kernel_resources`; no GPU is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from asag.trt_plugins.compile import (
    ARCHITECTURES,
    FIRST_WITH_TENSOR_CORES,
    nvrtc_version,
    resource_usage,
    supported_capabilities,
)
from benchmarks.kernel_cases import DEMO, PUBLISHED, Sizes, cases


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
