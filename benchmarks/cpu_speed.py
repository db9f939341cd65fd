"""What deployment gains on this CPU: `python -m benchmarks.cpu_speed`.

Ratios come from one run in which the variants, of several detectors too, take turns; memory and start-up are those of
the command `asag detect` in a process of its own.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from PIL import Image
from rich.console import Console

from asag.runtime.preprocessing import ImageLike
from asag.runtime.session import Session
from asag.runtime.speed.benchmark import BenchmarkReport, Latency, measure, ratio_of
from asag.runtime.speed.stage_times import measure_stages
from asag.runtime.speed.table import benchmark_table

PRESET = "asag-a-r50-1x-100"
INPUT_SIZE = (800, 1216)

VARIANTS = 3
"""PyTorch with norms as trained and folded, and ONNX Runtime."""

# Runs the command line, then reports the largest resident memory that the kernel saw of this process.
_MEASURED_COMMAND = """
import sys
from asag.cli.main import main
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
    checkpoints: Sequence[Path],
    folder: Path,
    images: list[ImageLike],
    *,
    rounds: int,
    warmup: int,
    threads: int | None,
    stages: bool = False,
) -> tuple[list[Path], BenchmarkReport]:
    """Export every checkpoint into `folder` and time it against PyTorch without and with folded norms, in that order:
    unfolded, folded, ONNX Runtime. Returns the exported files and the report.

    stages: also time the stages of the last two.
    """
    models, sessions = [], []
    for checkpoint in checkpoints:
        model, variants = open_variants(checkpoint, folder, threads=threads)
        models.append(model)
        sessions += variants
    report = measure(sessions, images, rounds=rounds, warmup=warmup)
    if stages:
        told = [session for place, session in enumerate(sessions) if place % VARIANTS]
        times = measure_stages(told, images, rounds=rounds, warmup=warmup, threads=threads)
        report = dataclasses.replace(report, stage_times=times)
    return models, report


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
    from asag.export.model import export_onnx
    from asag.runtime.backends.pytorch_session import PyTorchSession
    from asag.runtime.opening import open_session

    if threads is not None:
        torch.set_num_threads(threads)
    detector, info = load_detector(checkpoint)
    folded = DeployedDetector(detector, info, INPUT_SIZE)
    unfolded = DeployedDetector(detector, info, INPUT_SIZE, fold_norms=False)
    model = folder / f"{checkpoint.stem}.onnx"
    export_onnx(folded, model)
    return model, [
        PyTorchSession(unfolded, f"{checkpoint.stem}, norms as trained"),
        PyTorchSession(folded, f"{checkpoint.stem}, norms folded"),
        open_session(model, threads=threads, contexts=contexts),
    ]


def ratio_lines(report: BenchmarkReport) -> list[str]:
    """The ratios as sentences, with their 10th and 90th percentile over the rounds."""
    found = report.latencies
    pairs: list[tuple[str, Latency, Latency]] = []
    for place in range(0, len(found), VARIANTS):
        unfolded, folded, exported = found[place : place + VARIANTS]
        name = exported.name.removesuffix(".onnx")
        pairs += [
            (f"{name}, ONNX Runtime / PyTorch eager (norms folded)", exported, folded),
            (f"{name}, ONNX Runtime / PyTorch eager (norms as trained)", exported, unfolded),
            (f"{name}, PyTorch, norms folded / as trained", folded, unfolded),
        ]
    first, *others = found[VARIANTS - 1 :: VARIANTS]
    pairs += [(f"{first.name} / {other.name}, both ONNX Runtime", first, other) for other in others]
    lines = []
    for name, one, base in pairs:
        middle, low, high = ratio_of(one.rounds_ms, base.rounds_ms)
        lines.append(f"{name}: {middle:.2f} (10..90 %: {low:.2f}..{high:.2f})")
    return lines


def random_checkpoint(folder: Path, name: str = PRESET, size: tuple[int, int] = INPUT_SIZE) -> Path:
    """A checkpoint of random weights of a preset for inputs of `size` (height, width), called like it.

    Timing does not depend on what weights have learned, since shapes are static and all query places are computed. Only
    where queries look decides what is in the caches, so what starts at zero is random too.
    """
    import torch

    from asag import build_detector, find_preset
    from asag.checkpoint import CheckpointInfo, save_detector
    from asag.datasets import DATASETS

    preset = find_preset(name)
    torch.manual_seed(0)
    detector = build_detector(preset.config)
    with torch.no_grad():
        for parameter in detector.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    path = folder / f"{name}.safetensors"
    info = CheckpointInfo.of(preset, DATASETS[preset.dataset])
    save_detector(path, detector, dataclasses.replace(info, input=dataclasses.replace(info.input, size=size)))
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
@click.option("--preset", "presets", multiple=True, default=[PRESET], show_default=True, help="One or several.")
@click.option(
    *("--checkpoint", "checkpoints"),
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    help="In place of presets with random weights.",
)
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Measured runs of each variant.")
@click.option("--warmup", type=click.IntRange(0), default=2, show_default=True, help="Runs before that do not count.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; each backend's choice by default.")
@click.option("--stages", is_flag=True, help="Also the time of each stage.")
def main(
    presets: tuple[str, ...],
    checkpoints: tuple[Path, ...],
    rounds: int,
    warmup: int,
    threads: int | None,
    stages: bool,
) -> None:
    """Time detectors at 800x1216, batch 1, and print ratios, peak memory and start-up.

    The ratios of several are those of the first to each of the others.
    """
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = random_images(folder)
        weights = checkpoints or [random_checkpoint(folder, preset) for preset in presets]
        models, report = compare_variants(
            weights, folder, images, rounds=rounds, warmup=warmup, threads=threads, stages=stages
        )
        console.print(benchmark_table(report))
        for line in ratio_lines(report):
            console.print(line, highlight=False)
        console.print(f"load of the minute before: {report.machine.load:.1f}", highlight=False)
        for model in models:
            found = [measure_detect(model, Path(str(images[0])), folder / "out", threads) for _ in range(3)]
            console.print(detect_line(model.stem, found), highlight=False)


def detect_line(name: str, found: Sequence[DetectProcess]) -> str:
    """What several runs of `asag detect` took, in a sentence."""
    seconds = sorted(run.seconds for run in found)
    return (
        f"{name}, asag detect, ONNX Runtime: peak memory {max(run.peak_bytes for run in found) / 1e9:.2f} GB,"
        f" from start to the first detection {seconds[len(found) // 2]:.1f} s"
        f" (of {len(found)}: {seconds[0]:.1f}..{seconds[-1]:.1f} s)"
    )


if __name__ == "__main__":
    main()
