from __future__ import annotations

import dataclasses
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from asag.runtime.parity.comparison import Unavailable
from asag.runtime.speed.benchmark import measure, measure_throughput
from asag.runtime.speed.energy import EnergyMeter
from asag.runtime.speed.peak_memory import peak_memory_mib
from asag.runtime.speed.table import benchmark_table
from tests.runtime.toy_detector import ToySession


def wait(seconds: float) -> ToySession:
    return ToySession(change=lambda outputs: time.sleep(seconds), name=f"wait-{seconds}")


IMAGES = [np.full((40, 40, 3), value, np.uint8) for value in (10, 200)]


def test_ratio_of_a_slower_session() -> None:
    report = measure([wait(0.002), wait(0.02)], IMAGES, rounds=8, warmup=1)
    first, second = report.latencies
    assert first.ratio is None
    assert second.ratio is not None
    assert second.ratio > 1.5
    assert second.differs
    assert second.p50_ms <= second.p90_ms <= second.p99_ms
    assert second.stages_p50_ms["run"] >= 20
    assert second.images_per_second == pytest.approx(1000 / second.p50_ms)
    json.dumps(report.to_json(), allow_nan=False)


def test_calls_are_counted_and_batched() -> None:
    session = ToySession()
    seen: list[tuple[int, int]] = []
    report = measure(
        [session], IMAGES, rounds=4, warmup=2, batch_size=3, progress=lambda done, count: seen.append((done, count))
    )
    assert session.calls == [3] * 6
    assert seen[-1] == (6, 6)
    assert report.versions == {"numpy": np.__version__}


@pytest.mark.parametrize(
    ("low", "high", "differs"), [(0.9, 1.1, False), (1.0, 1.3, False), (1.01, 1.3, True), (0.5, 0.99, True)]
)
def test_a_spread_around_1_is_no_difference(low: float, high: float, differs: bool) -> None:
    report = measure([ToySession(), ToySession(name="other")], IMAGES, rounds=2, warmup=0)
    first, second = report.latencies
    second = dataclasses.replace(second, ratio=(low + high) / 2, ratio_low=low, ratio_high=high)
    assert not first.differs
    assert second.differs == differs
    console = Console(file=io.StringIO(), width=80)
    console.print(benchmark_table(dataclasses.replace(report, latencies=(first, second))))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"({low:.2f}..{high:.2f})" in text
    assert ("other (numpy): no difference" in text) != differs


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rounds": 0}, "at least 1"), ({"batch_size": 9}, "at most 4 images"), ({"warmup": -1}, "at least 1")],
)
def test_wrong_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure([ToySession(max_batch=4)], IMAGES, **options)
    with pytest.raises(ValueError, match="at least one model"):
        measure([], IMAGES)


def test_throughput_of_every_size_that_a_model_takes() -> None:
    sessions = [wait(0.01), ToySession(max_batch=2)]
    rows = measure_throughput(sessions, IMAGES, (1, 4), rounds=4, warmup=0)
    assert [(row.name, row.batch_size) for row in rows] == [("wait-0.01", 1), ("toy", 1), ("wait-0.01", 4), ("toy", 4)]
    first, _, batched, refused = rows
    assert (refused.images_per_second, refused.reason) == (None, "it takes at most 2 images at once")
    assert first.images_per_second is not None
    assert batched.images_per_second is not None
    assert first.low is not None
    assert first.high is not None
    assert first.low <= first.images_per_second <= first.high < 101
    assert batched.images_per_second > 2 * first.images_per_second, "it waits once for a batch"
    report = measure(sessions, IMAGES, rounds=2, warmup=0)
    missing = Unavailable("m.engine", "tensorrt-rtx", "fp16", "no driver")
    report = dataclasses.replace(report, throughput=rows, unavailable=(missing,), peak_memory_mib=(123.4, None))
    console = Console(file=io.StringIO(), width=100)
    console.print(benchmark_table(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in ("not taken", "no driver", "123 MiB", "Images per second"):
        assert expected in text
    json.dumps(report.to_json(), allow_nan=False)


def test_memory_is_that_of_the_model_alone(toy_onnx: Path) -> None:
    ballast = np.ones(100_000_000)  # 763 MiB that the measured process does not have
    peak = peak_memory_mib(toy_onnx, threads=1)
    assert ballast[-1] == 1
    assert peak is not None
    assert 20 < peak < 600
    assert peak_memory_mib(toy_onnx.with_name("none.onnx")) is None


@pytest.mark.gpu
def test_energy_counter_rises() -> None:
    meter = EnergyMeter.open()
    if meter is None:
        pytest.skip("this GPU has no energy counter")
    before = meter.joules()
    time.sleep(0.3)
    assert meter.joules() > before


def test_a_session_on_the_cpu_has_no_gpu_energy() -> None:
    assert all(row.joules_per_image is None for row in measure_throughput([ToySession()], IMAGES, (1,), rounds=1))
