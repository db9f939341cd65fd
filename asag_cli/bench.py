"""`asag bench`."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from asag_cli.console import EXISTING_FILE, HELP, OUTPUT_FILE, console, device_option, progress_bar, threads_option

if TYPE_CHECKING:
    from runtime.parity import Unavailable
    from runtime.session import Session

BACKENDS = ("pytorch", "torch-compile", "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt-rtx")
"""What `--against` knows."""


class NamesType(click.ParamType):
    """Names from a list, with commas between them."""

    name = "NAME,..."

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Parse the text; a tuple is taken as it is."""
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(","))
        for name in names:
            if name not in self.known:
                self.fail(f"unknown {name!r}; choose of {', '.join(self.known)}", param, ctx)
        return tuple(dict.fromkeys(names))


class SizesType(click.ParamType):
    """Batch sizes with commas between them."""

    name = "N,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse the text; a tuple is taken as it is."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is no list of batch sizes, such as 1,2,4", param, ctx)
        return tuple(dict.fromkeys(map(int, parts)))


@click.command(context_settings=HELP, short_help="Latency of models, measured in turn.")
@click.argument("models", nargs=-1, required=True, type=EXISTING_FILE)
@click.option("--images", required=True, type=click.Path(path_type=Path), help="An image or a folder of them.")
@click.option(
    "--against",
    type=NamesType(BACKENDS),
    help=f"Run every checkpoint with these backends, in this order: {', '.join(BACKENDS)}.",
)
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True, help="Measured runs of each model.")
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True, help="Runs before that do not count.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Images that run together.")
@click.option("--batch-sizes", type=SizesType(), help="Also measure images per second at these, such as 1,2,4.")
@click.option("--memory", is_flag=True, help="Also measure each model's peak memory, in a process of its own.")
@click.option("--json", "json_path", type=OUTPUT_FILE, help="Also write the numbers to this file.")
@device_option
@threads_option
def bench(
    models: tuple[Path, ...],
    images: Path,
    against: tuple[str, ...] | None,
    rounds: int,
    warmup: int,
    batch_size: int,
    batch_sizes: tuple[int, ...] | None,
    memory: bool,
    json_path: Path | None,
    device: str,
    threads: int | None,
) -> None:
    """Measure MODELS on the same images, one after another in every round, from decoded pixels to detections.

    Ratios are to the first model, round by round, with their 10th and 90th percentile; where these leave 1 in between,
    the difference is noise and is not called one. A model that cannot run here is named with the reason.

    With --against, a checkpoint is exported and built as far as its backends need it, into a temporary folder.
    """
    from runtime.benchmark import benchmark_table, measure, measure_throughput
    from runtime.detect import expand_paths
    from runtime.files import write_json
    from runtime.parity import Unavailable
    from runtime.peak_memory import peak_memory_mib

    pictures = expand_paths([images])[:64]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asag-bench-")))
        opened = list(open_models(models, against, folder, device, threads))
        missing = tuple(model for model, _ in opened if isinstance(model, Unavailable))
        running = [(model, path) for model, path in opened if not isinstance(model, Unavailable)]
        sessions = [model for model, _ in running]
        if not sessions:
            for model in missing:
                console.print(f"{model.name} ({model.backend}) was not run: {model.reason}", style="yellow")
            raise ValueError("none of the models can run on this machine")
        with progress_bar("measuring") as advance:
            result = measure(sessions, pictures, rounds=rounds, warmup=warmup, batch_size=batch_size, progress=advance)
        result = dataclasses.replace(result, unavailable=missing)
        if batch_sizes:
            with progress_bar("batch sizes") as advance:
                found = measure_throughput(sessions, pictures, batch_sizes, progress=advance)
            result = dataclasses.replace(result, throughput=found)
        if memory:
            with console.status("memory"):
                peaks = tuple(
                    None
                    if model.backend.startswith("torch-compile")
                    else peak_memory_mib(path, device, threads, batch_size)
                    for model, path in running
                )
            result = dataclasses.replace(result, peak_memory_mib=peaks)
    console.print(benchmark_table(result))
    if json_path is not None:
        write_json(json_path, result.to_json())


def open_models(
    models: Sequence[Path], against: Sequence[str] | None, folder: Path, device: str, threads: int | None
) -> Iterator[tuple[Session | Unavailable, Path]]:
    """Every model, or for a checkpoint every backend of ``against``, each with the file it runs.

    Raises ValueError when ``against`` is given and a model is no checkpoint.
    """
    from runtime.parity import open_candidate

    for number, path in enumerate(models):
        if against is None:
            yield open_candidate(path, device=device, threads=threads), path
            continue
        if path.suffix.lower() != ".safetensors":
            raise ValueError(f"{path} is no checkpoint: --against exports and builds from a .safetensors file")
        place = folder / str(number)
        place.mkdir()
        for backend in against:
            yield _open_backend(path, backend, place, device, threads)


def _open_backend(
    checkpoint: Path, backend: str, folder: Path, device: str, threads: int | None
) -> tuple[Session | Unavailable, Path]:
    from runtime.errors import BackendUnavailableError, one_line
    from runtime.parity import Unavailable, open_candidate

    if backend == "pytorch":
        return open_candidate(checkpoint, device=device, threads=threads), checkpoint
    try:
        if backend == "torch-compile":
            from runtime.pytorch_session import open_compiled

            with console.status("compiling"):
                return open_compiled(checkpoint, device, threads), checkpoint
        model = _export(checkpoint, folder)
        if backend.startswith("onnxruntime"):
            kind = device if backend.endswith("cuda") and device != "cpu" else backend.rpartition("-")[2]
            return open_candidate(model, device=kind, threads=threads), model
        from runtime.engine_build import build_engine

        engine = model.with_suffix(".engine")
        with console.status("building"):
            build_engine(model, engine)
        return open_candidate(engine, device=device), engine
    except BackendUnavailableError as error:
        return Unavailable(checkpoint.name, backend, "fp32", one_line(error)), checkpoint


def _export(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as ONNX, exported when first asked for."""
    path = folder / f"{checkpoint.stem}.onnx"
    if not path.is_file():
        from asag.checkpoint import load_detector
        from asag.deploy import DeployedDetector
        from export.model import export_onnx

        with console.status("exporting"):
            export_onnx(DeployedDetector(*load_detector(checkpoint)), path)
    return path
