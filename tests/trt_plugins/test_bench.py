"""The parts of the benchmark that need no GPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from trt_plugins.bench import Limits, Row, least_work, main, random_inputs, table
from trt_plugins.plan import OPERATIONS
from trt_plugins.resources import DEMO, PUBLISHED, Case, cases

DEMO_CASES = [*cases(DEMO, batch=2)]


@pytest.mark.parametrize("case", DEMO_CASES, ids=lambda case: f"{case.name} {case.kind}")
def test_inputs_have_the_shapes_of_the_case(case: Case) -> None:
    arrays = random_inputs(case)
    assert [array.shape for array in arrays] == [tuple(shape) for shape in case.shapes]
    for tensor, array in zip(OPERATIONS[case.name].inputs, arrays, strict=True):
        assert array.dtype == (np.bool_ if tensor.type == "bool" else np.float32)
        assert np.isfinite(array).all()


def test_least_work_of_mixing_counts_what_must_move() -> None:
    half, single = (
        least_work(next(case for case in cases(PUBLISHED) if case.name == "SamplingMixing" and case.element == element))
        for element in ("float16", "float32")
    )
    places = 300 * 4
    assert half[1] == single[1] > 2 * places * (32 * 64 * 64 + 128 * 32 * 64)
    parameters_and_output = places * (64 * 64 + 128 * 32) + places * 128 * 64
    assert single[0] > 4 * parameters_and_output
    assert half[0] < single[0] < 2 * half[0]


def test_the_table_has_a_line_per_row() -> None:
    limits = Limits("Example GPU", 4e12, 60e12, 800e12)
    rows = [Row(case, 2, 10.0, 5.0, 200.0, None, None) for case in DEMO_CASES[:3]]
    lines = table([*rows, dataclasses.replace(rows[0], definition=None)], limits).splitlines()
    assert lines[0].startswith("Example GPU, 20")
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert "| 10.0 | 50% | 200.0 | 20.0x | - | - |" in lines[4]
    assert len(lines) == 4 + 4


def test_without_a_gpu_it_says_so() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        main([])
