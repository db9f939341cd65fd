"""`asag bench`."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from asag.cli.console import EXISTING_FILE, HELP, OUTPUT_FILE, console, device_option, progress_bar, threads_option

if TYPE_CHECKING:
    from asag.runtime.parity.comparison import Unavailable
    from asag.runtime.session import Session
    from asag.runtime.speed.limits import ModelLimits, Rates
    from asag.runtime.speed.stage_times import StageTimes

BACKENDS = (
    *("pytorch", "torch-compile"),
    *("onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-tensorrt"),
    *("tensorrt", "tensorrt-rtx"),
)
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
@click.option("--stages", is_flag=True, help="Also measure the time of each stage of the network.")
@click.option("--limit", is_flag=True, help="Also say how far each stage is from what this machine can do.")
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
    stages: bool,
    limit: bool,
    memory: bool,
    json_path: Path | None,
    device: str,
    threads: int | None,
) -> None:
    """Measure MODELS on the same images, one after another in every round, from decoded pixels to detections.

    Ratios are to the first model, round by round, with their 10th and 90th percentile; where these leave 1 in between,
    the difference is noise and is not called one. A model that cannot run here is named with the reason.

    With --stages, each model is measured again, divided into pre-processing, copies, the parts that its family names
    (features first) and post-processing; on the CPU for exported files. With --limit, each stage of the network is set
    beside the time that its arithmetic and its bytes take at the rates of a large matrix product and a large copy.

    With --against, a checkpoint is exported and built as far as its backends need it, into a temporary folder.
    """
    from asag.runtime.detect import expand_paths
    from asag.runtime.files import write_json
    from asag.runtime.parity.comparison import Unavailable
    from asag.runtime.speed.benchmark import measure, measure_throughput
    from asag.runtime.speed.peak_memory import peak_memory_mib
    from asag.runtime.speed.stage_times import measure_stages
    from asag.runtime.speed.table import benchmark_table

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
        if stages or limit:
            with progress_bar("stages") as advance:
                times = measure_stages(
                    *(sessions, pictures), rounds=rounds, batch_size=batch_size, threads=threads, progress=advance
                )
            result = dataclasses.replace(result, stage_times=times)
        if limit:
            exported = [(session, _exported(path, models, folder)) for session, path in running]
            limits = find_limits(result.stage_times, exported, batch_size, device, threads)
            result = dataclasses.replace(result, limits=limits)
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


def find_limits(
    times: Sequence[StageTimes],
    exported: Sequence[tuple[Session, Path]],
    batch_size: int,
    device: str,
    threads: int | None,
) -> tuple[ModelLimits, ...]:
    """The limits of every model that runs, each with its exported file, on ``device`` or the CPU."""
    from asag.runtime.speed.limits import measure_rates, model_limits

    rates: dict[str, Rates] = {}
    found = []
    for stages, (session, path) in zip(times, exported, strict=True):
        kind = "cpu" if session.backend.endswith(("-cpu", "pytorch")) else device
        if stages.reason is None and kind not in rates:
            with console.status("rates of this machine"):
                rates[kind] = measure_rates(kind, threads)
        found.append(model_limits(stages, path, batch_size, rates.get(kind)))
    return tuple(found)


def open_models(
    models: Sequence[Path], against: Sequence[str] | None, folder: Path, device: str, threads: int | None
) -> Iterator[tuple[Session | Unavailable, Path]]:
    """Every model, or for a checkpoint every backend of ``against``, each with the file it runs.

    Raises ValueError when ``against`` is given and a model is no checkpoint.
    """
    from asag.runtime.parity.comparison import open_candidate

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
    from asag.runtime.errors import BackendUnavailableError, one_line
    from asag.runtime.parity.comparison import Unavailable, open_candidate

    if backend == "pytorch":
        return open_candidate(checkpoint, device=device, threads=threads), checkpoint
    try:
        if backend == "torch-compile":
            from asag.runtime.backends.pytorch_session import open_compiled

            with console.status("compiling"):
                return open_compiled(checkpoint, device, threads), checkpoint
        model = _export(checkpoint, folder)
        if backend.startswith("onnxruntime"):
            kind, index = backend.rpartition("-")[2], device.partition(":")[2]
            place = f"{kind}:{index}" if index and kind != "cpu" else kind
            return open_candidate(model, device=place, threads=threads), model
        from asag.runtime.engines.backend import BACKENDS as BUILDERS
        from asag.runtime.engines.build import BuildOptions, build_engine

        engine = folder / f"{model.stem}.{backend}.engine"
        with console.status("building"):
            build_engine(model, engine, BuildOptions(BUILDERS[backend]))
        return open_candidate(engine, device=device), engine
    except BackendUnavailableError as error:
        return Unavailable(checkpoint.name, backend, "fp32", one_line(error)), checkpoint


def _exported(path: Path, models: Sequence[Path], folder: Path) -> Path:
    """The file, or for one of ``models`` that is a checkpoint what it is exported to."""
    if path.suffix.lower() != ".safetensors":
        return path
    place = folder / str(models.index(path))
    place.mkdir(exist_ok=True)
    return _export(path, place)


def _export(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as ONNX, exported when first asked for."""
    path = folder / f"{checkpoint.stem}.onnx"
    if not path.is_file():
        from asag.checkpoint import load_detector
        from asag.deploy import DeployedDetector
        from asag.export.model import export_onnx

        with console.status("exporting"):
            export_onnx(DeployedDetector(*load_detector(checkpoint)), path)
    return path
