"""What the kernels promise of memory: nothing is moved in vain where the layout allows it. Counted without a GPU."""

from __future__ import annotations

import pytest

from benchmarks.kernel_cases import Case
from tests.ptx_machine.kernel_work import Counted, count, counted_cases

# Neighbouring threads read neighbouring channels, so that nearly every byte of a sector is wanted; what is beside the
# maps, a few points or boxes per block, may be a twentieth more.
MOST_SECTORS = 1.05
# The tiles of both products are padded so that no two rows begin in one bank; norms and sums are a tenth of the passes.
MOST_PASSES = 1.1


def counted(name: str) -> list[Case]:
    return [case for case in counted_cases() if case.name == name]


def checked(case: Case) -> Counted:
    found = count(case)
    assert found.extra_sectors >= 1
    assert found.extra_passes >= 1
    return found


@pytest.mark.parametrize(
    "case",
    [case for name in ("PyramidRoIAlign", "SamplingMixing") for case in counted(name) if case.channels_last],
    ids=lambda case: f"{case.name} {case.kind}",
)
def test_channels_last_maps_are_read_without_waste(case: Case) -> None:
    assert checked(case).extra_sectors <= MOST_SECTORS


@pytest.mark.parametrize("case", counted("MultiScaleDeformableAttention"), ids=lambda case: case.kind)
def test_attention_reads_whole_sectors_of_cells(case: Case) -> None:
    """Each round of points reads a part of the sectors that hold a query's weights: in 16 bits a quarter."""
    found = checked(case)
    assert found.extra_sectors <= (1.06 if case.element == "float32" else 1.13)
    assert found.extra_passes <= MOST_PASSES


@pytest.mark.parametrize("case", counted("SamplingMixing"), ids=lambda case: case.kind)
def test_the_products_meet_no_bank_conflicts(case: Case) -> None:
    assert checked(case).extra_passes <= MOST_PASSES
