"""Presets through every command of `asag`: `python -m tests.whole_way FOLDER PRESET[=PUBLISHED_FILE]...`.

With a published file the way starts at `asag zoo convert`, and what is exported are its weights; else those of the
short training. Each command is a process of its own; the table says its minutes and its peak memory. Published sizes
take minutes and gigabytes a preset, so the tests of the repository take only small ones this way.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

console = Console()


@dataclass(frozen=True)
class Step:
    """One command, the seconds and bytes it took, and its last line where it failed."""

    name: str
    seconds: float
    peak_bytes: int
    failure: str | None


def run(name: str, log: Path, *arguments: str | Path) -> Step:
    """Run `asag` with these arguments; what it prints is appended to `log`."""
    command = [sys.executable, "-m", "asag.cli.main", *map(str, arguments)]
    began = time.monotonic()
    with log.open("a") as output:
        print(f"\n$ asag {' '.join(command[3:])}", file=output, flush=True)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    last = log.read_text(errors="replace").strip().splitlines()[-1]
    failure = f"exit code {process.returncode}: {last}" if process.returncode else None
    return Step(name, time.monotonic() - began, used.ru_maxrss * 1024, failure)


def whole_way(preset: str, published: Path | None, folder: Path, data: Path, size: str | None) -> Iterator[Step]:
    """Every command of one preset; those behind a failure still run where their input is there.

    size: HxW of the models' input and, as one shorter side, of the training's images; None: the preset's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, model, weights = folder / "log.txt", folder / "model.onnx", folder / "run/weights.safetensors"
    start: list[str | Path] = []
    if published is not None:
        weights = folder / "converted.safetensors"
        yield run("convert", log, "zoo", "convert", published, "--preset", preset, "-o", weights)
        start = ["--weights", weights]
    train = ["--steps", "2", "--batch-size", "1", "--set", "evaluation_interval=0", "--device", "cpu", "--quiet"]
    if size is not None:
        train += ["--set", f"training_shorter_sides=[{size.split('x')[0]}]", "--set", "crop_probability=0"]
    input_size = () if size is None else ("--input-size", size)
    yield run("train", log, "train", "--preset", preset, "--data", data, *train, *start, "-o", folder / "run")
    yield run("export", log, "export", weights, "-o", model, *input_size)
    half = folder / "half.onnx"
    yield run("export fp16", log, "export", weights, "-o", half, "--precision", "fp16", *input_size)
    few = ("--data", data, "--images", "2", "--stages")
    yield run("parity", log, "parity", weights, model, *few, "--check")
    yield run("parity fp16", log, "parity", model, half, *few, "--no-batch-check")
    images = data / "val2017"
    yield run("quantize", log, "quantize", model, "-o", folder / "int8.onnx", "--calibration", images)
    yield run("build", log, "build", model, "-o", folder / "model.engine", "--precision", "fp16", "--batch", "1")
    yield run("serve", log, "serve-repository", model, "-o", folder / "repository")
    yield run("detect", log, "detect", images, "--model", model, "--stages", "-o", folder / "pictures")


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("presets", nargs=-1, required=True)
@click.option("--data", type=click.Path(path_type=Path), help="COCO folder, for files of COCO; drawings by default.")
@click.option("--input-size", metavar="HxW", help="Of models and training, where the published one takes too long.")
@click.option("--keep", is_flag=True, help="Keep the models; a published size has about 1 GB of them.")
def main(folder: Path, presets: tuple[str, ...], data: Path | None, input_size: str | None, keep: bool) -> None:
    """Take PRESETS through every command in FOLDER; exit with 1 when a command failed."""
    folder.mkdir(parents=True, exist_ok=True)
    if data is None and not (data := folder / "data").is_dir():
        made = run("data", folder / "data.txt", "data", "synthetic", data, "--train-images", "8", "--val-images", "2")
        assert made.failure is None, made.failure
    table, failed = Table("preset", "command", "minutes", "peak GB", "failure"), False
    for argument in presets:
        preset, _, published = argument.partition("=")
        for step in whole_way(preset, Path(published) if published else None, folder / preset, data, input_size):
            row = (preset, step.name, f"{step.seconds / 60:.1f}", f"{step.peak_bytes / 1e9:.1f}", step.failure or "")
            console.print(*row, highlight=False)
            table.add_row(*row)
            failed |= step.failure is not None
        if not keep:
            for path in (folder / preset).rglob("*"):
                if path.suffix in (".onnx", ".engine", ".safetensors", ".pt"):
                    path.unlink()
    console.print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
