"""What the benchmark found: as data, as Markdown."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trt_plugins.benchmark.contenders import COLD, GRAPH, KERNEL, PYTHON
from trt_plugins.benchmark.limits import Limits, nvidia_smi
from trt_plugins.benchmark.results import Aim, Result, Timing, check_aims
from trt_plugins.benchmark.timing import Spread
from trt_plugins.compile import nvrtc_version


def describe_machine(device: str) -> dict[str, Any]:
    """What the numbers depend on; None for what is not known."""
    import torch

    on_gpu = device == "cuda"
    driver = nvidia_smi("driver_version") if on_gpu else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())) if on_gpu else None,
        "processor": _processor(),
        "driver": driver[0] if driver else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "torchvision": _version("torchvision"),
        "onnxruntime": _version("onnxruntime-gpu") or _version("onnxruntime"),
        "tensorrt": _version("tensorrt"),
        "nvrtc": _nvrtc(),
    }


def to_json(
    results: Sequence[Result], limits: Limits, machine: Mapping[str, Any], rounds: int, complete: bool
) -> dict[str, Any]:
    """All of it as JSON values. Times in microseconds; spreads are median, 10th and 90th percentile over the rounds."""
    return {
        "machine": dict(machine),
        "rounds": rounds,
        "complete": complete,
        "limits": dataclasses.asdict(limits) | {"float_operations": limits.float_operations},
        "aims": [dataclasses.asdict(aim) | {"met": aim.met} for aim in check_aims(results, limits)],
        "results": [_result_json(result, limits) for result in results],
    }


def _result_json(result: Result, limits: Limits) -> dict[str, Any]:
    return {
        "op": result.case.name,
        "level": result.case.level,
        "sizes": result.case.sizes.name,
        "queries": result.case.sizes.queries,
        "batch": result.batch,
        "element": result.case.element,
        "least_bytes": result.work.moved_bytes,
        "least_operations": result.work.operations,
        "limit_microseconds": result.work.microseconds(limits),
        "limited_by": result.work.bound(limits),
        "timings": [
            {
                "what": timing.what,
                "how": timing.how,
                "computes_in": timing.element,
                "channels_last": timing.case and timing.case.channels_last,
                "tensor_cores": timing.case and timing.case.tensor_cores,
                "microseconds": timing.spread and dataclasses.asdict(timing.spread),
                "of_limit": _as_dict(result.of_limit(timing.case, limits) if timing.case else None)
                if timing.how == COLD
                else None,
                "kernel_is_faster_by": _faster(result, timing, GRAPH),
                "kernel_from_python_is_faster_by": _faster(result, timing, PYTHON),
                "not_measured_because": timing.reason or None,
                "rounds": [round(value, 3) for value in timing.times],
            }
            for timing in result.timings
        ],
    }


def to_markdown(results: Sequence[Result], limits: Limits, machine: Mapping[str, Any], rounds: int) -> str:
    """Machine and date, the aims, and a table of the kernels and one of the comparisons."""
    nominal = "" if limits.float_nominal is None else f" ({limits.float_nominal / 1e12:.1f} from its clock)"
    versions = ", ".join(f"{key} {machine[key]}" for key in ("driver", "torch", "nvrtc", "onnxruntime") if machine[key])
    head = [
        f"{machine['gpu'] or machine['processor']}, {machine['date'][:10]}; {versions}.",
        f"Copies {limits.bytes_per_second / 1e12:.2f} TB/s, float32 {limits.float_measured / 1e12:.1f} TFLOP/s"
        f"{nominal}, float16 matrices {limits.half_operations / 1e12:.0f} TFLOP/s.",
        f"Microseconds, median (10th..90th percentile) of {rounds} rounds that time all of an op's rows in turn.",
    ]
    aims = [f"- {_aim_text(aim)}" for aim in check_aims(results, limits)]
    return "\n".join([*head, "", *aims, "", *_kernel_table(results, limits), "", *_comparison_table(results)]) + "\n"


def _aim_text(aim: Aim) -> str:
    verdict = {True: "met", False: "missed", None: "not decided"}[aim.met]
    if aim.worst is None or aim.worst.value is None:
        return f"{aim.text}: {verdict}, not measured"
    against = f", against {aim.worst.against}" if aim.worst.against else ""
    number = _range(aim.worst.value, "{:.2f}" if aim.target < 1 else "{:.1f}")
    count = sum(finding.met is True for finding in aim.findings)
    return f"{aim.text}: {verdict} ({count} of {len(aim.findings)}); at worst {number}{against}: {aim.worst.place}"


def _kernel_table(results: Sequence[Result], limits: Limits) -> list[str]:
    rows = []
    for result in results:
        for case in result.cases:
            share = result.of_limit(case, limits)
            cells = [*_place_cells(result), case.kind]
            cells += [_range(result.kernel(case, how).spread) for how in (GRAPH, COLD, PYTHON)]
            limit = f"{result.work.microseconds(limits):.1f} ({result.work.bound(limits)})"
            rows.append([*cells, limit, "-" if share is None else f"{share.median:.0%}"])
    heads = ["op", "sizes", "queries", "batch", "kernel", "in a graph", "caches empty", PYTHON, "limit", "of the limit"]
    return _table(heads, rows)


def _comparison_table(results: Sequence[Result]) -> list[str]:
    rows = []
    for result in results:
        for timing in result.comparisons():
            cells = [*_place_cells(result), f"{result.case.level} {result.case.element}".strip()]
            cells += [f"{timing.what} {timing.how}", timing.element, _range(timing.spread)]
            in_graph, both = (result.faster_than(timing, how) for how in (GRAPH, PYTHON))
            rows.append(
                [*cells, _range(in_graph, "{:.1f}x"), _range(both if timing.how == PYTHON else None, "{:.1f}x")]
            )
    heads = ["op", "sizes", "queries", "batch", "kernel", "compared with", "which computes in", "us"]
    heads += ["kernel in a graph faster by", "both from Python"]
    return _table(heads, rows)


def _place_cells(result: Result) -> list[str]:
    return [result.case.name, result.case.sizes.name, str(result.case.sizes.queries), str(result.batch)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]


def _range(spread: Spread | None, form: str = "{:.1f}") -> str:
    if spread is None:
        return "-"
    return f"{form.format(spread.median)} ({form.format(spread.low)}..{form.format(spread.high)})"


def _faster(result: Result, timing: Timing, how: str) -> dict[str, float] | None:
    return None if timing.what == KERNEL else _as_dict(result.faster_than(timing, how))


def _as_dict(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else dataclasses.asdict(spread)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvrtc() -> str | None:
    try:
        return nvrtc_version()
    except ValueError:
        return None
