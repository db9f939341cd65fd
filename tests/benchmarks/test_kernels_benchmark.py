"""The whole benchmark on the CPU: another timer and a stand-in for the kernels, all else as on a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

from asag.runtime.speed.limits import Rates
from asag.trt_plugins.launch import ITEM_SIZES, DeviceArray, prepare_call
from benchmarks import kernels
from benchmarks.kernel_cases import DEMO, PUBLISHED, Case, cases
from benchmarks.kernel_results import (
    AIMS,
    COLD,
    DEFINITION,
    GRAPH,
    KERNEL,
    ONNX_BODY,
    PYTHON,
    TORCHVISION,
    Finding,
    Result,
    Timing,
    least_work,
    verdict,
)
from benchmarks.kernels import Device, case_groups, main
from benchmarks.timing import ClockTimer, NotCapturableError, Sampler, Spread, interleave

SMALL = dataclasses.replace(
    DEMO, name="published", finest=(24, 40), first=40, anchors_per_patch=5, capacity=(4, 6), queries=12
)
RATES = Rates("a GPU", operations=60e12, half_operations=800e12, bytes=4e12)


class NoWaiting(TorchDispatchMode):
    """Refuses what would make Python wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default):
            raise NotCapturableError(f"waits for {func}")
        return func(*args, **(kwargs or {}))


def refuse_to_copy(tensor: torch.Tensor) -> torch.Tensor:
    """On a CPU, where the tensor is there already, no operation is dispatched for this."""
    raise NotCapturableError("waits for aten._to_copy.default")


class StandInTimer(ClockTimer):
    """The clock for all three ways to time; refuses to capture what a CUDA graph could not hold."""

    def in_graph(self, run: Callable[[], Any]) -> Sampler:
        with NoWaiting(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "cpu", refuse_to_copy)
            run()
        return self.from_python(run)

    def cold(self, run: Callable[[], Any]) -> Sampler:
        large = np.zeros(1 << 20)

        def sample() -> float:
            large.fill(1)
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6

        return sample


def stand_in_launch(
    name: str,
    inputs: Sequence[DeviceArray],
    outputs: Sequence[DeviceArray],
    attributes: Mapping[str, Any],
    stream: int,
    tensor_cores: bool,
) -> None:
    """Checks the arrays as a launch does, and writes every output."""
    prepare_call(name, inputs, outputs, attributes, tensor_cores)
    for array in outputs:
        ctypes.memset(array.pointer, 0, math.prod(array.shape) * ITEM_SIZES[array.type])


CPU = Device("cpu", StandInTimer(), stand_in_launch, "CPUExecutionProvider")


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str, device: Device = CPU) -> Any:
    monkeypatch.setattr(kernels, "PUBLISHED", SMALL)
    monkeypatch.setattr(kernels, "MIXING_QUERIES", (6, 9))
    monkeypatch.setattr(kernels, "find_device", lambda: device)
    monkeypatch.setattr(kernels, "find_rates", lambda: RATES)
    return CliRunner().invoke(main, ["--rounds", "3", "--sizes", "published", *arguments])


@pytest.mark.slow
def test_the_whole_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table, numbers = tmp_path / "table.md", tmp_path / "numbers.json"
    result = run_main(monkeypatch, "--batch", "2", "--output", str(table), "--json", str(numbers))
    assert result.exit_code == 0, result.output
    assert table.read_text() in result.output
    found = json.loads(numbers.read_text())
    assert found["complete"] is True
    assert torch.__version__.startswith(found["machine"]["versions"]["torch"])
    assert found["rates"]["device"] == "a GPU"

    # AdaptiveProbing on two levels and the maps' ops in three types, SamplingMixing at three numbers of queries,
    # deformable attention in three parts, SelectTokens, and SampleGrid in three types.
    assert len(found["results"]) == 2 * 3 + 1 + 3 + 3 * 3 + 3 * 3 + 1 + 3
    assert {entry["queries"] for entry in found["results"] if entry["op"] == "SamplingMixing"} == {6, 9, 12}
    for entry in found["results"]:
        timings = {(timing["what"], timing["how"]) for timing in entry["timings"]}
        expected = {(KERNEL, how) for how in (PYTHON, GRAPH, COLD)} | {(DEFINITION, PYTHON), (DEFINITION, GRAPH)}
        expected |= {(ONNX_BODY, PYTHON)}
        if entry["op"] == "PyramidRoIAlign":
            expected |= {(TORCHVISION, PYTHON), (TORCHVISION, GRAPH)}
        assert timings == expected
        for timing in entry["timings"]:
            waits = timing["how"] == GRAPH and timing["what"] != KERNEL
            if waits and entry["op"] in ("AdaptiveProbing", "PyramidRoIAlign"):
                assert "waits for aten" in timing["not_measured_because"]
                assert timing["microseconds"] is None
                continue
            assert timing["not_measured_because"] is None
            spread = timing["microseconds"]
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
            assert len(timing["rounds"]) == 3
            assert (timing["of_limit"] is not None) == (timing["how"] == COLD)
            assert (timing["kernel_in_a_graph_is_faster_by"] is not None) == (timing["what"] != KERNEL)
    assert result.stderr.count("waits for aten") == 2 * 3 + 3 * 2

    aims = {aim["text"]: aim for aim in found["aims"]}
    assert len(aims) == 7
    assert len(aims["SamplingMixing is 5 times faster than its steps"]["findings"]) == 3 * 3
    assert all(aim["met"] is not None for aim in aims.values())

    rows = [line for line in table.read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + sum(len(entry["timings"]) for entry in found["results"])
    assert len({line.count("|") for line in rows}) == 1


def test_it_keeps_what_it_has_when_a_kernel_breaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(name: str, *rest: Any) -> None:
        if rest[0][0].type == "float16":
            raise ValueError("CUDA refused: A_REASON")
        stand_in_launch(name, *rest)

    path = tmp_path / "numbers.json"
    result = run_main(
        monkeypatch, "--batch", "1", "--op", "PyramidRoIAlign", "--json", str(path), "--no-compare",
        device=dataclasses.replace(CPU, launch=broken),
    )  # fmt: skip
    assert result.exit_code == 1
    assert "6 timings of kernels are missing" in result.stderr
    assert "float16: kernel in a graph: CUDA refused: A_REASON" in result.stderr
    found = json.loads(path.read_text())
    assert found["complete"] is True
    for entry in found["results"]:
        assert all((t["microseconds"] is None) == (entry["element"] == "float16") for t in entry["timings"])


def test_it_keeps_what_it_has_when_it_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(name: str, *rest: Any) -> None:
        if rest[0][0].type == "float16":
            raise KeyboardInterrupt
        stand_in_launch(name, *rest)

    path = tmp_path / "numbers.json"
    result = run_main(
        monkeypatch, "--batch", "1", "--op", "PyramidRoIAlign", "--json", str(path), "--no-compare",
        device=dataclasses.replace(CPU, launch=stopped),
    )  # fmt: skip
    assert result.exit_code == 1
    found = json.loads(path.read_text())
    assert found["complete"] is False
    assert [entry["element"] for entry in found["results"]] == ["float32"]


def case_of(name: str, element: str) -> Case:
    """The last of the published detectors' kernels, which is that of the tensor cores where there is one."""
    return [case for case in cases(PUBLISHED) if case.name == name and case.element == element][-1]


def test_least_work_of_mixing_counts_what_must_move() -> None:
    half, single = (least_work(case_of("SamplingMixing", element)) for element in ("float16", "float32"))
    places = 300 * 4
    assert half.half_operations == single.operations > 2 * places * (32 * 64 * 64 + 128 * 32 * 64)
    assert half.operations == single.half_operations == 0
    parameters_and_output = places * (64 * 64 + 128 * 32) + places * 128 * 64
    assert single.bytes > 4 * parameters_and_output
    assert half.bytes < single.bytes < 2 * half.bytes  # points are float32 in both


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def sampler(name: str) -> Sampler:
        return lambda: order.append(name) or float(len(order))

    times = interleave({"a": sampler("a"), "b": sampler("b"), "c": sampler("c")}, rounds=4)
    assert [len(values) for values in times.values()] == [4, 4, 4]
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert len(rounds) == 3 + 4
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert rounds[3:6] == ["abc", "bca", "cab"]


def result_of(name: str, times: Mapping[tuple[str, str], Sequence[float]]) -> Result:
    """A result of one float16 kernel at the published sizes."""
    case = case_of(name, "float16")
    timings = [
        Timing(what, how, "float16", case if what == KERNEL else None, tuple(values), "" if values else "broke")
        for (what, how), values in times.items()
    ]
    return Result((case,), tuple(timings))


def findings(*results: Result, rates: Rates = RATES) -> dict[str, list[Finding]]:
    return {aim.text.split(maxsplit=1)[1]: aim.findings(results, rates) for aim in AIMS}


def test_aims_are_held_against_the_fastest_other_side() -> None:
    kernel = {(KERNEL, GRAPH): [10, 11, 12], (KERNEL, COLD): [18, 19, 25], (KERNEL, PYTHON): [60, 60, 60]}
    probing = result_of("AdaptiveProbing", {**kernel, (DEFINITION, PYTHON): [900] * 3, (DEFINITION, GRAPH): [198] * 3})
    mixing = result_of("SamplingMixing", {**kernel, (DEFINITION, PYTHON): [90] * 3, (DEFINITION, GRAPH): []})
    # A copy that takes exactly half of the kernel's 19 us.
    rates = dataclasses.replace(RATES, bytes=least_work(mixing.case).bytes / 9.5e-6)
    found = findings(probing, mixing, rates=rates)
    (quick,) = found["takes at most 20 us"]
    assert (quick.met, quick.value) == (True, Spread.of([18, 19, 25]))
    (slower,) = found["is 20 times faster than PyTorch"]
    assert slower.value is not None
    assert (slower.met, slower.value.median, slower.against) == (False, 18, "PyTorch definition in a graph, float16")
    assert verdict(found["is 5 times faster than its steps"]) is True
    (share,) = found["reaches half of the GPU's limit"]
    assert share.value is not None
    assert (share.met, share.value.median) == (True, pytest.approx(0.5))
    assert verdict(found["is 3 times faster than torchvision"]) is None


def test_aims_compare_like_with_like() -> None:
    result = result_of("SamplingMixing", {(KERNEL, GRAPH): [10], (KERNEL, COLD): [], (DEFINITION, PYTHON): [90]})
    in_float32 = dataclasses.replace(result.timings[-1], computes_in="float32")
    found = findings(dataclasses.replace(result, timings=(*result.timings[:-1], in_float32)))
    assert found["is 5 times faster than its steps"] == []
    assert [finding.met for finding in found["reaches half of the GPU's limit"]] == [None]


def test_mixing_is_timed_at_three_numbers_of_queries() -> None:
    groups = list(case_groups(PUBLISHED, 1))
    mixing = [group[0] for group in groups if group[0].name == "SamplingMixing"]
    assert sorted((case.sizes.queries, case.element) for case in mixing) == sorted(
        (queries, element) for queries in (100, 200, 300) for element in ("float32", "float16", "bfloat16")
    )
    assert all(case.shapes[4][1] == case.sizes.queries for case in mixing)
    for group in groups:
        assert len({(case.name, case.part, case.element, str(case.shapes)) for case in group}) == 1


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    arguments = ["--sizes", "demo", "--batch", "1", "--rounds", "3", "--json", str(path)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    for entry in json.loads(path.read_text())["results"]:
        for timing in entry["timings"]:
            assert timing["what"] != KERNEL or timing["microseconds"]["median"] > 0


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = CliRunner().invoke(main, [])
    assert (result.exit_code, result.output) == (1, "Error: the benchmark needs an NVIDIA GPU; there is none here\n")
