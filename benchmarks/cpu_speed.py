"""What deployment gains on this CPU: `python -m benchmarks.cpu_speed`.

Ratios come from one run in which the variants take turns; memory and start-up are those of the command `asag detect` in
a process of its own.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from PIL import Image
from rich.console import Console

from runtime.preprocessing import ImageLike
from runtime.session import Session
from runtime.speed.benchmark import BenchmarkReport, measure, ratio_of
from runtime.speed.table import benchmark_table

PRESET = "asag-a-r50-1x-100"
INPUT_SIZE = (800, 1216)

# Runs the command line, then reports the largest resident memory that the kernel saw of this process.
_MEASURED_COMMAND = """
import sys
from asag_cli.main import main
try:
    main(sys.argv[1:])
finally:
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            print("peak-kib", line.split()[1])
"""


@dataclass(frozen=True)
class DetectProcess:
    """One `asag detect` of one image: seconds from its start to the result on disk, and its peak memory in bytes."""

    seconds: float
    peak_bytes: int


def measure_detect(model: Path, image: Path, output: Path, threads: int | None = None) -> DetectProcess:
    """Run `asag detect` once. Raises RuntimeError with its last line when it fails; needs Linux."""
    arguments = ["detect", str(image), "--model", str(model), "--output", str(output)]
    arguments += [] if threads is None else ["--threads", str(threads)]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED_COMMAND, *arguments], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
    report = [line.split() for line in lines if line.startswith("peak-kib")]
    if done.returncode != 0 or not report:
        raise RuntimeError(f"asag detect failed: {lines[-1]}")
    return DetectProcess(seconds, int(report[0][1]) * 1024)


def compare_variants(
    checkpoint: Path,
    folder: Path,
    images: list[ImageLike],
    *,
    rounds: int,
    warmup: int,
    threads: int | None,
) -> tuple[Path, BenchmarkReport]:
    """Export `checkpoint` into `folder` and time it against PyTorch with and without folded norms, in that order:
    unfolded, folded, ONNX Runtime. Returns the exported file and the report.
    """
    model, sessions = open_variants(checkpoint, folder, threads=threads)
    return model, measure(sessions, images, rounds=rounds, warmup=warmup)


def open_variants(
    checkpoint: Path,
    folder: Path,
    *,
    threads: int | None,
    contexts: int | None = None,
) -> tuple[Path, list[Session]]:
    """Export `checkpoint` into `folder`; the file, and sessions of PyTorch without and with folded norms and of it."""
    import torch

    from asag.checkpoint import load_detector
    from asag.deploy import DeployedDetector
    from export.model import export_onnx
    from runtime.backends.pytorch_session import PyTorchSession
    from runtime.opening import open_session

    if threads is not None:
        torch.set_num_threads(threads)
    detector, info = load_detector(checkpoint)
    folded = DeployedDetector(detector, info, INPUT_SIZE)
    unfolded = DeployedDetector(detector, info, INPUT_SIZE, fold_norms=False)
    model = folder / "model.onnx"
    export_onnx(folded, model)
    return model, [
        PyTorchSession(unfolded, "norms as trained"),
        PyTorchSession(folded, "norms folded"),
        open_session(model, threads=threads, contexts=contexts),
    ]


def ratio_lines(report: BenchmarkReport) -> list[str]:
    """The two ratios as sentences, with their 10th and 90th percentile over the rounds."""
    unfolded, folded, onnx_runtime = report.latencies
    lines = []
    for name, one, base in (
        ("ONNX Runtime / PyTorch eager (norms folded)", onnx_runtime, folded),
        ("ONNX Runtime / PyTorch eager (norms as trained)", onnx_runtime, unfolded),
        ("PyTorch, norms folded / as trained", folded, unfolded),
    ):
        middle, low, high = ratio_of(one.rounds_ms, base.rounds_ms)
        lines.append(f"{name}: {middle:.2f} (10..90 %: {low:.2f}..{high:.2f})")
    return lines


def random_checkpoint(path: Path) -> Path:
    """A checkpoint of random weights for :data:`INPUT_SIZE`.

    Timing does not depend on what weights have learned: shapes are static, all query places are computed.
    """
    import torch

    from asag import build_detector, find_preset
    from asag.checkpoint import CheckpointInfo, save_detector
    from asag.datasets import DATASETS

    preset = find_preset(PRESET)
    torch.manual_seed(0)
    detector = build_detector(preset.config)
    info = CheckpointInfo.of(preset, DATASETS[preset.dataset])
    save_detector(path, detector, dataclasses.replace(info, input=dataclasses.replace(info.input, size=INPUT_SIZE)))
    return path


def random_images(folder: Path, count: int = 4) -> list[ImageLike]:
    """Pictures of coloured blocks that fill the input, as files in `folder`."""
    generator = np.random.default_rng(0)
    paths: list[ImageLike] = []
    for number in range(count):
        blocks = Image.fromarray(generator.integers(0, 256, (20, 30, 3), np.uint8))
        path = folder / f"{number}.png"
        blocks.resize((INPUT_SIZE[1], INPUT_SIZE[0]), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path, dir_okay=False), help="Random weights by default.")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Measured runs of each variant.")
@click.option("--warmup", type=click.IntRange(0), default=2, show_default=True, help="Runs before that do not count.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; each backend's choice by default.")
def main(checkpoint: Path | None, rounds: int, warmup: int, threads: int | None) -> None:
    """Time ResNet-50 at 800x1216, batch 1, 200 query places, and print ratios, peak memory and start-up."""
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = random_images(folder)
        weights = checkpoint or random_checkpoint(folder / "random.safetensors")
        model, report = compare_variants(weights, folder, images, rounds=rounds, warmup=warmup, threads=threads)
        console.print(benchmark_table(report))
        for line in ratio_lines(report):
            console.print(line, highlight=False)
        found = [measure_detect(model, Path(str(images[0])), folder / "out", threads) for _ in range(3)]
    seconds = sorted(run.seconds for run in found)
    console.print(
        f"asag detect, ONNX Runtime: peak memory {max(run.peak_bytes for run in found) / 1e9:.2f} GB,"
        f" from start to the first detection {seconds[1]:.1f} s (of three: {seconds[0]:.1f}..{seconds[2]:.1f} s)",
        highlight=False,
    )


if __name__ == "__main__":
    main()
