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
from torch.utils._python_dispatch import TorchDispatchMode

from asag.ops import adaptive_probing_definition, pyramid_roi_align_definition
from asag.ops.sampling_mixing import sample_pyramid
from trt_plugins import bench
from trt_plugins.bench import case_groups, main
from trt_plugins.benchmark.contenders import (
    COLD,
    DEFINITION,
    GRAPH,
    KERNEL,
    ONNX_BODY,
    PYTHON,
    TORCHVISION,
    Device,
    random_inputs,
)
from trt_plugins.benchmark.limits import (
    Limits,
    Work,
    float_rate,
    least_work,
    measure_limits,
    nvidia_smi,
    touched_values,
)
from trt_plugins.benchmark.results import Result, Timing, check_aims
from trt_plugins.benchmark.timing import ClockTimer, NotCapturableError, Sampler, Spread, interleave
from trt_plugins.launch import ITEM_SIZES, DeviceArray, prepare_call
from trt_plugins.operations import OPERATIONS
from trt_plugins.resources import DEMO, PUBLISHED, Case, Sizes, cases

SMALL = dataclasses.replace(
    DEMO, name="published", finest=(24, 40), first=40, anchors_per_patch=5, capacity=(4, 6), queries=12
)
LIMITS = Limits(bytes_per_second=4e12, float_measured=60e12, half_operations=800e12)


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


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str, device: Device = CPU) -> None:
    monkeypatch.setattr(bench, "PUBLISHED", SMALL)
    monkeypatch.setattr(bench, "MIXING_QUERIES", (6, 9))
    main(["--rounds", "3", *arguments], device, LIMITS)


def test_the_whole_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, numbers = tmp_path / "table.md", tmp_path / "numbers.json"
    run_main(monkeypatch, "--sizes", "published", "--batch", "2", "--output", str(table), "--json", str(numbers))
    printed = capsys.readouterr()
    assert table.read_text() in printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json", "table.md"]
    found = json.loads(numbers.read_text())
    assert found["complete"] is True
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["date"].startswith("20")

    # AdaptiveProbing on two levels and the maps' ops in three types, SamplingMixing at three numbers of queries.
    assert len(found["results"]) == 2 * 3 + 1 + 3 + 3 * 3
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
            assert (timing["kernel_is_faster_by"] is not None) == (timing["what"] != KERNEL)
    assert printed.err.count("waits for aten") == 2 * 3 + 3 * 2

    aims = {aim["text"]: aim for aim in found["aims"]}
    assert len(aims) == 5
    assert len(aims["SamplingMixing is 5 times faster than its steps"]["findings"]) == 3 * 3
    assert all(aim["met"] is not None for aim in aims.values())

    kernel_rows = sum(len(group) for group in case_groups(SMALL, 2))
    compared = sum(timing["what"] != KERNEL for entry in found["results"] for timing in entry["timings"])
    lines = [line for line in table.read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + kernel_rows + 2 + compared
    assert len({line.count("|") for line in lines[: 2 + kernel_rows]}) == 1


def test_it_keeps_what_it_has_when_a_kernel_breaks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str, *rest: Any) -> None:
        if rest[0][0].type == "float16":
            raise ValueError("CUDA refused: A_REASON")
        stand_in_launch(name, *rest)

    path = tmp_path / "numbers.json"
    device = dataclasses.replace(CPU, launch=broken)
    with pytest.raises(ValueError, match="timings of kernels are missing"):
        run_main(
            monkeypatch, "--sizes", "published", "--batch", "1", "--op", "PyramidRoIAlign", "--json", str(path),
            "--no-compare", device=device,
        )  # fmt: skip
    assert "PyramidRoIAlign float16: kernel in a graph: CUDA refused: A_REASON" in capsys.readouterr().err
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
    with pytest.raises(KeyboardInterrupt):
        run_main(
            monkeypatch, "--sizes", "published", "--batch", "1", "--op", "PyramidRoIAlign", "--json", str(path),
            device=dataclasses.replace(CPU, launch=stopped),
        )  # fmt: skip
    found = json.loads(path.read_text())
    assert found["complete"] is False
    assert [entry["element"] for entry in found["results"]] == ["float32"]


@pytest.mark.parametrize("case", list(cases(DEMO, batch=2)), ids=lambda case: f"{case.name} {case.kind}")
def test_inputs_have_the_shapes_of_the_case(case: Case) -> None:
    arrays = random_inputs(case)
    assert [array.shape for array in arrays] == [tuple(shape) for shape in case.shapes]
    for tensor, array in zip(OPERATIONS[case.name].inputs, arrays, strict=True):
        assert array.dtype == (np.bool_ if tensor.type == "bool" else np.float32)
        assert np.isfinite(array).all()


def case_of(name: str, sizes: Sizes = DEMO, batch: int = 2, element: str = "float32") -> Case:
    return next(case for case in cases(sizes, batch) if case.name == name and case.element == element)


def test_touched_values_are_those_that_have_a_gradient() -> None:
    """A second opinion: what a bilinear sample reads is what its gradient reaches."""

    def reached(maps: Sequence[torch.Tensor], output: torch.Tensor) -> int:
        (output * torch.rand_like(output)).sum().backward()
        return sum(int((map_.grad != 0).sum()) for map_ in maps if map_.grad is not None)

    for name in ("PyramidRoIAlign", "SamplingMixing"):
        case = case_of(name)
        inputs = random_inputs(case)
        maps = [torch.from_numpy(array).requires_grad_() for array in inputs[:4]]
        where = torch.from_numpy(inputs[4])
        output = (
            pyramid_roi_align_definition(*maps, where)
            if name == "PyramidRoIAlign"
            else sample_pyramid(tuple(maps), where)
        )
        touched = touched_values(case, inputs)
        assert 0 < touched < sum(array.size for array in inputs[:4])
        assert touched == pytest.approx(reached(maps, output), rel=2e-3)

    case = case_of("AdaptiveProbing")
    anchors, valid, feature, sizes = (torch.from_numpy(array) for array in random_inputs(case))
    feature.requires_grad_()
    patches = adaptive_probing_definition(anchors, valid, feature, sizes, **case.attributes).patches
    assert touched_values(case, random_inputs(case)) == reached([feature], patches)


def test_least_work_of_mixing_counts_what_must_move() -> None:
    half, single = (
        least_work(case, random_inputs(case))
        for case in (case_of("SamplingMixing", PUBLISHED, 1, element) for element in ("float16", "float32"))
    )
    places = 300 * 4
    assert half.operations == single.operations > 2 * places * (32 * 64 * 64 + 128 * 32 * 64)
    parameters_and_output = places * (64 * 64 + 128 * 32) + places * 128 * 64
    assert single.moved_bytes > 4 * parameters_and_output
    assert half.moved_bytes < single.moved_bytes < 2 * half.moved_bytes
    assert half.uses_tensor_cores
    assert not single.uses_tensor_cores


def test_work_takes_the_longer_of_moving_and_computing() -> None:
    moving, computing = Work(8e6, 1e6, False), Work(8e3, 6e8, False)
    assert (moving.microseconds(LIMITS), moving.bound(LIMITS)) == (pytest.approx(2), "memory")
    assert (computing.microseconds(LIMITS), computing.bound(LIMITS)) == (pytest.approx(10), "arithmetic")
    on_tensor_cores = dataclasses.replace(computing, uses_tensor_cores=True)
    assert on_tensor_cores.microseconds(LIMITS) == pytest.approx(0.75)


def test_limits_are_measured_and_checked_by_the_clock() -> None:
    limits = measure_limits("cpu", StandInTimer(), copied=1 << 16, side=32)
    assert min(limits.bytes_per_second, limits.float_measured, limits.half_operations) > 0
    assert limits.float_operations == limits.float_measured
    # The vendor's figures: 67 TFLOP/s for an H200, 19.5 for an A100.
    assert float_rate(90, 132, 1980) == pytest.approx(67e12, rel=0.01)
    assert float_rate(80, 108, 1410) == pytest.approx(19.5e12, rel=0.01)
    assert float_rate(999, 132, 1980) is None
    assert dataclasses.replace(limits, float_nominal=1e18).float_operations == 1e18


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


def result_of(name: str, times: Mapping[tuple[str, str], Sequence[float]], element: str = "float16") -> Result:
    """A result at the published sizes; of SamplingMixing one kernel only, the last."""
    case = [case for case in cases(PUBLISHED) if case.name == name and case.element == element][-1]
    timings = [
        Timing(what, how, element, case if what == KERNEL else None, tuple(values), "" if values else "broke")
        for (what, how), values in times.items()
    ]
    return Result((case,), Work(40e6, 0.0, True), tuple(timings))


def test_aims_are_held_against_the_fastest_other_side() -> None:
    kernel = {(KERNEL, GRAPH): [10, 11, 12], (KERNEL, COLD): [18, 19, 25], (KERNEL, PYTHON): [60, 60, 60]}
    probing = result_of("AdaptiveProbing", {**kernel, (DEFINITION, PYTHON): [900] * 3, (DEFINITION, GRAPH): [198] * 3})
    mixing = result_of("SamplingMixing", {**kernel, (DEFINITION, PYTHON): [90] * 3, (DEFINITION, GRAPH): []})
    aims = {aim.text.split(maxsplit=1)[1]: aim for aim in check_aims([probing, mixing], LIMITS)}
    assert aims["takes at most 20 us"].met is True
    assert aims["takes at most 20 us"].worst.value == Spread.of([18, 19, 25])
    slower = aims["is 20 times faster than PyTorch"]
    assert (slower.met, slower.worst.value.median, slower.worst.against) == (
        False, 18, "PyTorch definition in a graph, float16",
    )  # fmt: skip
    assert aims["is 5 times faster than its steps"].met is True
    # 40 MB at 4 TB/s are 10 us, and the kernel takes 19 with empty caches.
    share = aims["reaches half of the GPU's limit"]
    assert (share.met, share.worst.value.median) == (True, pytest.approx(10 / 19))
    assert aims["is 3 times faster than torchvision"].met is None


def test_aims_compare_like_with_like() -> None:
    result = result_of("SamplingMixing", {(KERNEL, GRAPH): [10], (KERNEL, COLD): [], (DEFINITION, PYTHON): [90]})
    in_float32 = dataclasses.replace(result.timings[-1], element="float32")
    aims = check_aims([dataclasses.replace(result, timings=(*result.timings[:-1], in_float32))], LIMITS)
    faster, share = (aim for aim in aims if aim.op == "SamplingMixing")
    assert faster.findings == ()
    assert (faster.met, share.met) == (None, None)


def test_mixing_is_timed_at_three_numbers_of_queries() -> None:
    groups = list(case_groups(PUBLISHED, 1))
    mixing = [group[0] for group in groups if group[0].name == "SamplingMixing"]
    assert sorted((case.sizes.queries, case.element) for case in mixing) == sorted(
        (queries, element) for queries in (100, 200, 300) for element in ("float32", "float16", "bfloat16")
    )
    assert all(case.shapes[4][1] == case.sizes.queries for case in mixing)
    for group in groups:
        assert len({(case.name, case.level, case.element, str(case.shapes)) for case in group}) == 1


def test_the_driver_is_asked_for_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(
        "#!/bin/sh\necho \"$1\" >$0.asked\necho 'GPU-1, 580.95.05, 1980'\necho 'GPU-2, 580.95.05, 1700'\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("trt_plugins.benchmark.limits._identity", lambda: "")
    assert nvidia_smi("driver_version", "clocks.max.sm") == ["580.95.05", "1980"]
    assert command.with_suffix(".asked").read_text() == "--query-gpu=uuid,driver_version,clocks.max.sm\n"
    monkeypatch.setattr("trt_plugins.benchmark.limits._identity", lambda: "2")
    assert nvidia_smi("driver_version", "clocks.max.sm") == ["580.95.05", "1700"]
    assert nvidia_smi("driver_version") is None
    command.unlink()
    assert nvidia_smi("driver_version") is None


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    main(["--sizes", "demo", "--batch", "1", "--rounds", "3", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["machine"]["gpu"]
    for entry in found["results"]:
        for timing in entry["timings"]:
            assert timing["what"] != KERNEL or timing["microseconds"]["median"] > 0


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        main([])
