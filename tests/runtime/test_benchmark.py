from __future__ import annotations

import io
import json
import time

import numpy as np
import pytest
from rich.console import Console
from toy_detector import ToySession

from runtime.benchmark import benchmark_table, measure


def wait(seconds: float) -> ToySession:
    return ToySession(change=lambda outputs: time.sleep(seconds), name=f"wait-{seconds}")


IMAGES = [np.full((40, 40, 3), value, np.uint8) for value in (10, 200)]


def test_ratio_of_a_slower_session() -> None:
    report = measure([wait(0.002), wait(0.008)], IMAGES, rounds=8, warmup=1)
    first, second = report.latencies
    assert first.ratio is None
    assert second.ratio is not None
    assert second.ratio > 1.5
    assert second.differs
    assert second.p50_ms <= second.p90_ms <= second.p99_ms
    assert second.stages_p50_ms["run"] >= 8
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


def test_noise_is_not_called_a_difference() -> None:
    report = measure([wait(0.003), wait(0.003)], IMAGES, rounds=10, warmup=1)
    console = Console(file=io.StringIO(), width=200)
    console.print(benchmark_table(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert report.machine.processor in text
    if not report.latencies[1].differs:
        assert "no difference" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rounds": 0}, "at least 1"), ({"batch_size": 9}, "at most 4 images"), ({"warmup": -1}, "at least 1")],
)
def test_wrong_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure([ToySession(max_batch=4)], IMAGES, **options)
    with pytest.raises(ValueError, match="at least one model"):
        measure([], IMAGES)
