"""Times the kernels on this machine's GPU: `python -m trt_plugins.bench`.

Per op, size, batch and type: the kernels' times, with warm and with empty caches, how far they are from what the GPU
could do, and how much faster they are than the PyTorch definition, than torchvision where that has the op, and than the
ONNX body on ONNX Runtime's CUDA provider; all of these in turn, round by round. Measuring needs PyTorch; the kernels do
not.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from trt_plugins.benchmark.contenders import Device, find_contenders, op_model, random_inputs
from trt_plugins.benchmark.limits import Limits, least_work, measure_limits
from trt_plugins.benchmark.report import describe_machine, to_json, to_markdown
from trt_plugins.benchmark.results import Result, Timing
from trt_plugins.benchmark.timing import CudaTimer, first_line, interleave
from trt_plugins.launch import launch
from trt_plugins.operations import OPERATIONS
from trt_plugins.resources import DEMO, PUBLISHED, Case, Sizes, cases

__all__ = ["case_groups", "main", "measure", "op_model"]

MIXING_QUERIES = (100, 200)
"""Numbers of queries that SamplingMixing is timed with beside the published sizes' own."""


def case_groups(sizes: Sizes, batch: int) -> Iterator[list[Case]]:
    """The cases of a detector of `sizes`, those together that differ in layout and use of tensor cores alone."""
    found = list(cases(sizes, batch))
    if sizes is PUBLISHED:
        for queries in MIXING_QUERIES:
            fewer = dataclasses.replace(sizes, queries=queries)
            found += [case for case in cases(fewer, batch) if case.name == "SamplingMixing"]
    for _, group in groupby(found, key=lambda case: (case.name, case.sizes.queries, case.level, case.element)):
        yield list(group)


def measure(group: Sequence[Case], device: Device, rounds: int, compare: bool) -> Result:
    """Time the kernels of a group, and what they are compared with if `compare`, in turn."""
    inputs = random_inputs(group[0])
    contenders = find_contenders(group, inputs, device, compare)
    samplers = {index: it.sampler for index, it in enumerate(contenders) if it.sampler is not None}
    try:
        times = interleave(samplers, rounds)
    except Exception as error:  # a GPU out of memory, or a kernel that broke: the other groups are still wanted
        print(f"{group[0].name}: {first_line(error)}", file=sys.stderr)
        times = {}
        contenders = [dataclasses.replace(it, reason=it.reason or first_line(error)) for it in contenders]
    timings = tuple(Timing.of(it, times.get(index, ())) for index, it in enumerate(contenders))
    return Result(tuple(group), least_work(group[0], inputs), timings)


def main(arguments: Sequence[str] | None = None, device: Device | None = None, limits: Limits | None = None) -> None:
    """Measure, print the tables and write them. Raises ValueError where there is no GPU, or a kernel did not run.

    device, limits: stand-ins for this machine's GPU, for tests.
    """
    parser = argparse.ArgumentParser(prog="python -m trt_plugins.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", choices=("published", "demo", "all"), default="all")
    parser.add_argument("--op", choices=tuple(OPERATIONS), help="only this op")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="images per launch")
    parser.add_argument("--rounds", type=int, default=20, help="times that everything is timed")
    parser.add_argument("--no-compare", action="store_true", help="time the kernels only")
    parser.add_argument("--output", type=Path, help="also write the tables to this Markdown file")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args(arguments)
    if min(options.rounds, *options.batch) < 1:
        raise ValueError("--rounds and --batch must be at least 1")
    device = device or _gpu()
    import torch

    groups = [
        group
        for sizes in (PUBLISHED, DEMO)
        for batch in options.batch
        for group in case_groups(sizes, batch)
        if options.sizes in (sizes.name, "all") and options.op in (None, group[0].name)
    ]
    results: list[Result] = []
    text = ""
    with torch.no_grad():
        machine = describe_machine(device.name)
        limits = limits or measure_limits(device.name, device.timer)
        for number, group in enumerate(groups, start=1):
            results.append(measure(group, device, options.rounds, not options.no_compare))
            print(f"{number}/{len(groups)} {results[-1].place}", file=sys.stderr)
            gc.collect()  # graphs and sessions hold memory of the GPU
            text = to_markdown(results, limits, machine, options.rounds)
            # After every group, so that a run that is stopped leaves what it has.
            if options.output is not None:
                _write(options.output, text)
            if options.json is not None:
                content = to_json(results, limits, machine, options.rounds, complete=number == len(groups))
                _write(options.json, json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(text)
    broken = sum(not timing.times for result in results for timing in result.timings if timing.case is not None)
    if broken:
        raise ValueError(f"{broken} timings of kernels are missing; the reasons are above the tables")


def _gpu() -> Device:
    try:
        import torch
    except ImportError as error:
        raise ValueError("the benchmark measures with PyTorch, which is not installed") from error
    if not torch.cuda.is_available():
        raise ValueError("the benchmark needs an NVIDIA GPU; there is none here")
    return Device("cuda", CudaTimer(), launch, "CUDAExecutionProvider")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
