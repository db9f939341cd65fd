from __future__ import annotations

import dataclasses
import io
import json
import time

import numpy as np
import pytest
from rich.console import Console

from runtime.benchmark import benchmark_table, measure
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
