"""PyTorch on a GPU, end to end: eager, torch.compile, and the custom kernels in a CUDA graph, measured in turn.

uint8 image on the device in, detections on the device out. Prints a table and writes JSON. Has not run on a GPU yet.
"""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from asag.checkpoint import load_detector
from asag.deploy import DeployedDetector
from asag.ops.cuda import register_cuda_kernels


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--batch-size", default=1, show_default=True)
@click.option("--rounds", default=50, show_default=True)
@click.option("--half", is_flag=True, help="Backbone and neck in float16.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(checkpoint: Path, batch_size: int, rounds: int, half: bool, json_path: Path | None) -> None:
    """Compare the ways to run CHECKPOINT."""
    deployed = DeployedDetector(*load_detector(checkpoint)).cuda()
    height, width = deployed.input_size
    images = torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8, device="cuda")
    sizes = torch.tensor([[height, width]] * batch_size, dtype=torch.float32, device="cuda")

    def run(model: torch.nn.Module) -> Callable[[], object]:
        def once() -> object:
            with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=half):
                return model(images, sizes)

        return once

    def features() -> object:
        with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=half):
            return deployed.detector.features(deployed.normalize(images, sizes))

    eager = run(deployed)
    compiled_model = copy.deepcopy(deployed)
    compiled_model.detector.backbone.compile()
    compiled_model.detector.neck.compile()
    ways = {"eager": eager, "torch.compile of backbone and neck": run(compiled_model)}
    for way in ways.values():
        way()  # with the definitions, before the kernels replace them
    times: dict[str, list[float]] = {name: [] for name in ways}
    measure(ways, times, rounds)
    register_cuda_kernels()
    with_kernels = {
        "kernels": eager,
        "kernels in a CUDA graph": captured(eager),
        "backbone and neck alone, in a CUDA graph": captured(features),
    }
    times |= {name: [] for name in with_kernels}
    measure(with_kernels, times, rounds)

    table = Table("way", "p50 ms", "p10", "p90", "of eager")
    base = float(np.median(times["eager"]))
    for name, values in times.items():
        low, middle, high = np.percentile(values, [10, 50, 90])
        table.add_row(name, f"{middle:.3f}", f"{low:.3f}", f"{high:.3f}", f"{middle / base:.2f}")
    Console().print(table)
    if json_path is not None:
        content = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
            "checkpoint": checkpoint.name,
            "batch_size": batch_size,
            "half": half,
            "milliseconds": times,
        }
        json_path.write_text(json.dumps(content, indent=2) + "\n")


def measure(ways: dict[str, Callable[[], object]], times: dict[str, list[float]], rounds: int) -> None:
    """Milliseconds of each way, one after another in every round, after three that do not count."""
    for number in range(-3, rounds):
        for name, way in ways.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            way()
            end.record()
            end.synchronize()
            if number >= 0:
                times[name].append(start.elapsed_time(end))


def captured(way: Callable[[], object]) -> Callable[[], object]:
    """The same work as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            way()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        way()
    return graph.replay


if __name__ == "__main__":
    main()
