"""Times the kernels on this machine's GPU: `python -m benchmarks.kernels`.

Per op, size, batch and type: the kernels' times, with warm and with empty caches, how far they are from what the GPU
could do, and how much faster they are than the PyTorch definition, than torchvision where that has the op, and than the
ONNX body on ONNX Runtime's CUDA provider; all of these in turn, round by round.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from asag.ops.cuda import find_definition
from asag.runtime.files import write_json
from asag.runtime.machine import describe_machine
from asag.runtime.speed.limits import Rates, measure_rates
from asag.trt_plugins.launch import DeviceArray, launch
from asag.trt_plugins.operations import OPERATIONS
from asag.trt_plugins.operations.pyramid_roi_align import ROI_SIDE
from benchmarks.kernel_cases import DEMO, PUBLISHED, Case, Sizes, cases, op_model
from benchmarks.kernel_results import (
    COLD,
    DEFINITION,
    GRAPH,
    KERNEL,
    ONNX_BODY,
    PYTHON,
    TORCHVISION,
    Result,
    Timing,
    to_json,
    to_markdown,
)
from benchmarks.timing import ClockTimer, CudaTimer, Sampler, first_line, interleave

MIXING_QUERIES = (100, 200)
"""Numbers of queries that SamplingMixing is timed with beside the published sizes' own."""

Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Device:
    """Where to time, and with what; a test gives stand-ins."""

    name: str
    """PyTorch's name of it."""
    timer: ClockTimer
    launch: Callable[..., None]
    """`trt_plugins.launch.launch`."""
    onnx_provider: str
    """Execution provider of ONNX Runtime."""


def case_groups(sizes: Sizes, batch: int) -> Iterator[list[Case]]:
    """The cases of a detector of `sizes`, those together that differ in layout and use of tensor cores alone."""
    found = list(cases(sizes, batch))
    if sizes is PUBLISHED:
        for queries in MIXING_QUERIES:
            fewer = dataclasses.replace(sizes, queries=queries)
            found += [case for case in cases(fewer, batch) if case.name == "SamplingMixing"]
    for _, group in groupby(found, key=lambda case: (case.name, case.sizes.queries, case.part, case.element)):
        yield list(group)


class Contenders:
    """The ways to do what a group's cases do, on the same inputs; what cannot run keeps the reason."""

    def __init__(self, group: Sequence[Case], device: Device) -> None:
        self.group, self.case, self.device = group, group[0], device
        self.operation = OPERATIONS[self.case.name]
        arrays = self.operation.sample(np.random.default_rng(0), self.case.shapes, self.case.attributes)
        self.tensors = [torch.from_numpy(array).to(device.name) for array in arrays]
        self.found: list[tuple[Timing, Sampler | None]] = []

    def add_kernels(self) -> None:
        """Each in a graph, with warm and with empty caches, and started from Python."""
        timer = self.device.timer
        for case in self.group:
            starts = ((GRAPH, timer.in_graph), (COLD, timer.cold), (PYTHON, timer.from_python))
            for how, start in starts:
                self._add(Timing(KERNEL, how, case.element, case), partial(self._start_kernel, case, start))

    def add_comparisons(self) -> None:
        """PyTorch's definition, torchvision and the ONNX body."""
        self._add_pytorch(DEFINITION, find_definition(self.operation))
        if self.case.name == "PyramidRoIAlign":
            self._add_pytorch(TORCHVISION, self._multi_scale_roi_align)
        element = "float16" if self.case.element == "float16" else "float32"
        self._add(Timing(ONNX_BODY, PYTHON, element), partial(self._start_onnx_body, element))

    def time(self, rounds: int) -> Result:
        """All that can run, in turn."""
        samplers = {index: sampler for index, (_, sampler) in enumerate(self.found) if sampler is not None}
        reason, times = "", {}
        try:
            times = interleave(samplers, rounds)
        except Exception as error:  # a GPU out of memory, or a kernel that broke: the other groups are still wanted
            reason = first_line(error)
            print(f"{self.case.name}: {reason}", file=sys.stderr)
        timings = [
            dataclasses.replace(timing, rounds=tuple(times.get(index, ())), reason=timing.reason or reason)
            for index, (timing, _) in enumerate(self.found)
        ]
        return Result(tuple(self.group), tuple(timings))

    def _add(self, timing: Timing, start: Callable[[], Sampler]) -> None:
        try:
            self.found.append((timing, start()))
        except Exception as error:  # whatever a library raises: the other contenders still run
            self._add_reason(timing, first_line(error))

    def _add_reason(self, timing: Timing, reason: str) -> None:
        print(f"{(timing.case or self.case).place}: {timing.what} {timing.how}: {reason}", file=sys.stderr)
        self.found.append((dataclasses.replace(timing, reason=reason), None))

    def _in_types(self, element: str) -> list[Tensor]:
        types = self.operation.types(element)
        return [value.to(getattr(torch, kind)) for value, kind in zip(self.tensors, types, strict=True)]

    def _start_kernel(self, case: Case, start: Callable[[Run], Sampler]) -> Sampler:
        given = self._in_types(case.element)
        if case.channels_last:
            for index in range(self.operation.maps):
                given[index] = given[index].contiguous(memory_format=torch.channels_last)
        shapes = self.operation.output_shapes(case.shapes, case.attributes)
        outputs = [
            torch.empty(tuple(shape), dtype=getattr(torch, tensor.resolve(case.element)), device=self.device.name)
            for tensor, shape in zip(self.operation.outputs, shapes, strict=True)
        ]

        def run() -> None:
            arrays = [[DeviceArray.of_tensor(value) for value in values] for values in (given, outputs)]
            stream = torch.cuda.current_stream().cuda_stream if self.device.name == "cuda" else 0
            self.device.launch(case.name, *arrays, case.attributes, stream, case.tensor_cores)

        return start(run)

    def _add_pytorch(self, what: str, function: Callable[..., Any]) -> None:
        """PyTorch's steps from Python and in a graph, in the first types that they take.

        These are the kernel's own; where maps and coordinates must be of one type, that of the maps, since coarser
        coordinates take no longer; else float32. Maps are row-major, as grid_sample and RoIAlign want them.
        """
        element = self.case.element
        kind = getattr(torch, element)
        tried = [
            (element, self._in_types(element)),
            (f"{element}, coordinates too", [v.to(kind) if v.is_floating_point() else v for v in self.tensors]),
            ("float32", self.tensors),
        ]
        timer = self.device.timer
        for computes_in, given in tried:
            run = partial(function, *given, **self.case.attributes)
            try:
                run()
            except Exception as error:  # whatever a library raises for a type that it does not take
                reason = first_line(error)
                continue
            for how, start in ((PYTHON, timer.from_python), (GRAPH, timer.in_graph)):
                self._add(Timing(what, how, computes_in), partial(start, run))
            return
        for how in (PYTHON, GRAPH):
            self._add_reason(Timing(what, how, element), reason)

    def _multi_scale_roi_align(self, *tensors: Tensor) -> Any:
        from torchvision.ops import MultiScaleRoIAlign

        *levels, boxes = tensors
        maps = dict(zip("0123", levels, strict=True))
        corners = list(torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2), dim=-1))
        height, width = self.case.sizes.finest
        align = MultiScaleRoIAlign(list(maps), output_size=ROI_SIDE, sampling_ratio=2)
        return align(maps, corners, [(4 * height, 4 * width)] * len(corners))

    def _start_onnx_body(self, element: str) -> Sampler:
        """In ONNX Runtime, all on the device; it returns when it is done, so the clock times it."""
        import onnxruntime

        provider = self.device.onnx_provider
        if provider not in onnxruntime.get_available_providers():
            raise RuntimeError(f"this ONNX Runtime has no {provider}")
        given = self._in_types(element)
        model = op_model(self.case.name, self.case.shapes, self.case.attributes, element)
        session = onnxruntime.InferenceSession(model, providers=[provider])
        if session.get_providers()[0] != provider:
            raise RuntimeError(f"{provider} did not start, its libraries may be missing")
        binding = session.io_binding()
        for value, tensor in zip(session.get_inputs(), given, strict=True):
            kind = getattr(np, str(tensor.dtype).removeprefix("torch.").replace("bool", "bool_"))
            binding.bind_input(value.name, self.device.name, 0, kind, tuple(tensor.shape), tensor.data_ptr())
        for value in session.get_outputs():
            binding.bind_output(value.name, self.device.name)
        return ClockTimer().from_python(lambda: (session.run_with_iobinding(binding), given))


def measure_groups(groups: Sequence[Sequence[Case]], device: Device, rounds: int, compare: bool) -> Iterator[Result]:
    """Time the kernels of each group, and what they are compared with if `compare`."""
    for number, group in enumerate(groups, start=1):
        contenders = Contenders(group, device)
        contenders.add_kernels()
        if compare:
            contenders.add_comparisons()
        result = contenders.time(rounds)
        del contenders
        gc.collect()  # graphs and sessions hold memory of the GPU
        print(f"{number}/{len(groups)} {result.case.place}", file=sys.stderr)
        yield result


def find_device() -> Device:
    """This machine's GPU. Raises ClickException where there is none."""
    if not torch.cuda.is_available():
        raise click.ClickException("the benchmark needs an NVIDIA GPU; there is none here")
    return Device("cuda", CudaTimer(), launch, "CUDAExecutionProvider")


def find_rates() -> Rates:
    """What this machine's GPU reaches."""
    return measure_rates("cuda")


@click.command()
@click.option("--sizes", type=click.Choice(["published", "demo", "all"]), default="all", show_default=True)
@click.option("--op", type=click.Choice(list(OPERATIONS)), help="Only this op.")
@click.option("--batch", type=click.IntRange(1), multiple=True, default=(1, 8), help="Images per launch.")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="Times that everything is timed.")
@click.option("--compare/--no-compare", default=True, help="Time what the kernels are compared with too.")
@click.option("--output", type=click.Path(path_type=Path), help="Also write the tables to this Markdown file.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all numbers to this file.")
def main(
    sizes: str,
    op: str | None,
    batch: tuple[int, ...],
    rounds: int,
    compare: bool,
    output: Path | None,
    json_path: Path | None,
) -> None:
    """Time the kernels and print tables; what is there is also written after each op."""
    device = find_device()
    groups = [
        group
        for known in (PUBLISHED, DEMO)
        for images in batch
        for group in case_groups(known, images)
        if sizes in (known.name, "all") and op in (None, group[0].name)
    ]
    results: list[Result] = []
    text, machine, rates = "", describe_machine(), find_rates()
    with torch.no_grad():
        for result in measure_groups(groups, device, rounds, compare):
            results.append(result)
            content = to_json(results, rates, machine, rounds, complete=len(results) == len(groups))
            text = to_markdown(content, machine, rates)
            # After every group, so that a run that is stopped leaves what it has.
            if output is not None:
                output.write_text(text)
            if json_path is not None:
                write_json(json_path, content)
    print(text)
    broken = sum(not timing.rounds for result in results for timing in result.timings if timing.case is not None)
    if broken:
        raise click.ClickException(f"{broken} timings of kernels are missing; the reasons are above the tables")


if __name__ == "__main__":
    main()
