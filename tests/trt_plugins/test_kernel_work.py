"""Guards for the kernels' speed where there is no GPU: what they ask of one must not grow."""

from __future__ import annotations

import pytest
from kernel_work import count, counted_cases

from benchmarks.kernel_cases import Case

# PTX instructions per warp, a tenth above what is counted; sectors and shared passes for each that must be.
MOST = {
    "AdaptiveProbing P4 float32": (4700, 4.3, 2.1),
    "AdaptiveProbing P4 float16": (4750, 5.9, 2.1),
    "AdaptiveProbing P3 float32": (7450, 4.0, 1.9),
    "AdaptiveProbing P3 float16": (7450, 5.4, 1.9),
    "GatherAnchors float32": (2850, 4.2, 2.1),
    "PyramidRoIAlign float32": (1520, 3.2, 2.2),
    "PyramidRoIAlign float32, channels-last": (1230, 1.01, 1.3),
    "PyramidRoIAlign float16": (1870, 4.4, 2.2),
    "PyramidRoIAlign float16, channels-last": (1320, 1.01, 1.3),
    "SamplingMixing float32": (6400, 6.3, 1.05),
    "SamplingMixing float32, channels-last": (5500, 1.01, 1.05),
    "SamplingMixing float16, tensor cores": (3200, 12.1, 1.1),
    "SamplingMixing float16, channels-last, tensor cores": (2100, 1.02, 1.1),
}


@pytest.mark.parametrize("case", list(counted_cases()), ids=lambda case: f"{case.name} {case.kind}")
def test_a_kernel_asks_no_more_of_a_gpu(case: Case) -> None:
    found = count(case)
    instructions, sectors, passes = MOST[f"{case.name} {case.kind}"]
    assert found.instructions <= instructions
    assert found.extra_sectors <= sectors
    assert found.extra_passes <= passes


def test_every_kernel_has_its_limits() -> None:
    assert set(MOST) == {f"{case.name} {case.kind}" for case in counted_cases()}
