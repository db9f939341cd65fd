"""PyTorch on a GPU, end to end: eager, torch.compile, and the custom kernels in a CUDA graph, measured in turn.

`python -m benchmarks.latency MODEL`: uint8 image on the device in, detections on the device out. MODEL is a checkpoint,
or a preset with random weights.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from asag.checkpoint import load_detector
from asag.deploy import DeployedDetector
from asag.ops import definitions_only
from asag.runtime.files import write_json
from asag.runtime.machine import describe_machine
from benchmarks.cpu_speed import random_checkpoint
from benchmarks.timing import ClockTimer, CudaTimer, Sampler, Spread, first_line, interleave, ratio

EAGER = "eager"
Way = Callable[[], Sampler]


@click.command()
@click.argument("model")
@click.option("--input-size", default="800x1344", show_default=True, metavar="HXW", help="Of a preset's input.")
@click.option("--batch-size", default=1, show_default=True)
@click.option("--rounds", default=50, show_default=True)
@click.option("--half", is_flag=True, help="Backbone and neck in float16.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True, help="Include torch.compile.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    model: str,
    input_size: str,
    batch_size: int,
    rounds: int,
    half: bool,
    device: str,
    compiled: bool,
    json_path: Path | None,
) -> None:
    """Compare the ways to run MODEL, a checkpoint or a preset's name. What cannot run is named with the reason."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("needs an NVIDIA GPU; there is none here (--device cpu tries the script itself)")
    with tempfile.TemporaryDirectory() as folder:
        height, width = map(int, input_size.lower().split("x"))
        checkpoint = Path(model)
        if not checkpoint.is_file():
            checkpoint = random_checkpoint(Path(folder), model, (height, width))
        deployed = DeployedDetector(*load_detector(checkpoint)).to(device)
    timer = CudaTimer() if device == "cuda" else ClockTimer()
    samplers: dict[str, Sampler] = {}
    reasons: dict[str, str] = {}
    for name, way in find_ways(deployed, device, timer, batch_size, half, compiled).items():
        try:
            samplers[name] = way()
        except Exception as error:  # whatever a compiler or a capture raises: the other ways still run
            reasons[name] = first_line(error)
            print(f"{name}: {reasons[name]}", file=sys.stderr)
    times = {name: [value / 1e3 for value in values] for name, values in interleave(samplers, rounds).items()}
    report(times, reasons)
    if json_path is not None:
        content: dict[str, Any] = {
            "machine": describe_machine().to_json(),
            "model": checkpoint.stem,
            "input_size": deployed.input_size,
            "batch_size": batch_size,
            "half": half,
            "rounds": rounds,
            "not_measured_because": reasons,
            "milliseconds": {name: dataclasses.asdict(Spread.of(values)) for name, values in times.items()},
            "of_eager": {
                name: dataclasses.asdict(ratio(values, times[EAGER]))
                for name, values in times.items()
                if EAGER in times
            },
            "rounds_milliseconds": times,
        }
        write_json(json_path, content)


def find_ways(
    deployed: DeployedDetector, device: str, timer: ClockTimer, batch_size: int, half: bool, compiled: bool
) -> dict[str, Way]:
    """What to compare by name; each way, once called, gives its sampler or raises."""
    height, width = deployed.input_size
    images = torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8, device=device)
    sizes = torch.tensor([[height, width]] * batch_size, dtype=torch.float32, device=device)

    def run(model: torch.nn.Module) -> Callable[[], object]:
        def once() -> object:
            with torch.inference_mode(), torch.autocast(device, torch.float16, enabled=half):
                return model(images, sizes)

        return once

    def features() -> object:
        with torch.inference_mode(), torch.autocast(device, torch.float16, enabled=half):
            return deployed.detector.features(deployed.normalize(images, sizes))

    def compile_parts() -> Sampler:
        model = copy.deepcopy(deployed)
        model.detector.backbone.compile()
        model.detector.neck.compile()
        return with_definitions(lambda: timer.from_python(run(model)))

    eager = run(deployed)
    ways: dict[str, Way] = {EAGER: lambda: with_definitions(lambda: timer.from_python(eager))}
    if compiled:
        ways["torch.compile of backbone and neck"] = compile_parts
    if device == "cuda":
        ways["kernels"] = lambda: timer.from_python(eager)
    ways["kernels in a CUDA graph"] = lambda: timer.in_graph(eager)
    ways["backbone and neck alone, in a CUDA graph"] = lambda: timer.in_graph(features)
    return ways


def with_definitions(way: Way) -> Sampler:
    """A sampler whose ops are the PyTorch definitions, also where kernels are registered."""
    with definitions_only():
        sampler = way()

    def sample() -> float:
        with definitions_only():
            return sampler()

    return sample


def report(times: dict[str, list[float]], reasons: dict[str, str]) -> None:
    """Print the ways, the reasons for those that were not measured among them."""
    table = Table("way", "p50 ms", "p10", "p90", "of eager", "p10", "p90")
    for name, values in times.items():
        milliseconds = Spread.of(values)
        cells = [f"{value:.3f}" for value in (milliseconds.median, milliseconds.low, milliseconds.high)]
        if EAGER in times:
            share = ratio(values, times[EAGER])
            cells += [f"{value:.2f}" for value in (share.median, share.low, share.high)]
        table.add_row(name, *cells)
    for name, reason in reasons.items():
        table.add_row(name, "not run", "", "", reason)
    Console().print(table)


if __name__ == "__main__":
    main()
