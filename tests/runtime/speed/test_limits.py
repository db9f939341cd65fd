"""Limits: what binds, what a table says, and rates that a machine can have."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from asag.runtime.speed import limits
from asag.runtime.speed.limits import ModelLimits, Rates, measure_rates, model_limits, stage_limit
from asag.runtime.speed.stage_times import StageTimes
from asag.runtime.speed.stage_work import StageWork
from asag.runtime.speed.table import limit_table
from tests.exports import small_export

RATES = Rates("a machine", operations=1e9, half_operations=4e9, bytes=1e6)
"""Slow enough in both that a few operations or bytes take milliseconds."""


@pytest.mark.parametrize(
    ("work", "limit_ms", "bound_by"),
    [
        (StageWork("head", 5e6, 0, 1e3), 5, "arithmetic"),
        (StageWork("head", 5e6, 0, 9e3), 9, "memory"),
        (StageWork("head", 5e6, 8e6, 1e3), 7, "arithmetic"),
    ],
)
def test_the_longer_of_two_times(work: StageWork, limit_ms: float, bound_by: str) -> None:
    found = stage_limit(work, 20.0, RATES)
    assert (found.limit_ms, found.bound_by) == (pytest.approx(limit_ms), bound_by)
    assert found.fraction == pytest.approx(limit_ms / 20)
    assert found.operations == work.operations + work.half_operations


def test_limits_of_an_exported_file(tmp_path: Path) -> None:
    path = small_export().write(tmp_path / "model.onnx")
    rates = Rates("a machine", operations=1e9, half_operations=4e9, bytes=5e9)
    stages = {"pre-processing": 0.1, "features": 8.0, "anchors": 4.0, "proposals": 3.0, "head": 2.0}
    found = model_limits(StageTimes("model.onnx", "onnxruntime-cpu", "fp32", stages), path, 1, rates)
    twice = model_limits(StageTimes("model.onnx", "onnxruntime-cpu", "fp32", stages), path, 2, rates)
    assert [stage.stage for stage in found.stages] == ["features", "anchors", "proposals", "head"]
    assert [stage.time_ms for stage in found.stages] == [8, 4, 3, 2]
    for one, two in zip(found.stages, twice.stages, strict=True):
        assert two.operations == 2 * one.operations > 0
        assert one.bytes < two.bytes < 2 * one.bytes, "weights are read once for a batch"
    console = Console(file=io.StringIO(), width=80)
    console.print(limit_table(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "arithmetic" in text
    assert "A stage beat its limit" in text, "thousandths of the time are no rates of this machine"
    assert "matrix products 1 GFLOP/s, in 16 bits 4" in text
    assert max(map(len, text.splitlines())) <= 80
    json.dumps(dataclasses.asdict(found))


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        (StageTimes("m.engine", "tensorrt-rtx", "fp16", {}, "no stages"), "no stages"),
        (StageTimes("m.onnx", "onnxruntime-cpu", "int8", {"head": 1.0}), "no rate is measured for int8"),
    ],
)
def test_no_limits_with_the_reason(times: StageTimes, reason: str) -> None:
    found = model_limits(times, "not opened.onnx", 1, RATES)
    assert found == ModelLimits(times.name, times.backend, times.precision, reason=reason)
    console = Console(file=io.StringIO(), width=80)
    console.print(limit_table(found))
    assert f"has no limits: {reason}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_rates_of_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_SECONDS", 0.1)
    rates = measure_rates("cpu", threads=1)
    assert rates.device == "CPU, 1 thread"
    assert 5e8 < rates.operations < 5e12
    assert rates.half_operations == rates.operations
    assert 5e8 < rates.bytes < 1e12


@pytest.mark.gpu
def test_rates_of_a_gpu() -> None:
    rates = measure_rates("cuda")
    assert rates.device
    assert 1e12 < rates.operations < rates.half_operations < 1e16
    assert 5e10 < rates.bytes < 1e14
