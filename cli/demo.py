"""`asag demo`: the whole way of a model on a small synthetic dataset."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from asag.cli.console import EXISTING_FILE, FOLDER, HELP, console, progress_bar

if TYPE_CHECKING:
    from asag.runtime.coco_dataset import CocoFolder
    from asag.runtime.parity.comparison import Unavailable
    from asag.runtime.session import Session
    from asag.runtime.speed.benchmark import BenchmarkReport

PRESET = "asag-a-tiny"
VAL_IMAGES = 100

CONTINUE_IMAGES = 96
CONTINUE_RECIPE = {
    "steps": 12,
    "log_interval": 4,
    "learning_rate": 5e-5,
    "backbone_learning_rate": 5e-5,
    "warmup_steps": 4,
    "ema_decay": 0.9,
}
"""A few careful steps from trained weights, each image once."""

SCRATCH_IMAGES = 1600
SCRATCH_RECIPE = {
    "steps": 450,
    "log_interval": 20,
    "learning_rate": 1e-3,
    "backbone_learning_rate": 1e-3,
    "warmup_steps": 50,
    "ema_decay": 0.99,
    "time_limit": 330.0,
}
"""As much training from nothing as fits the demo's eight minutes."""


MODELS = {"model.onnx": "fp32", "model-fp16.onnx": "fp16"}
"""Exported files and their precision; an engine is built from each."""


@dataclass(frozen=True)
class DemoResult:
    """Files of a finished demo and the reference's average precision."""

    ap: float
    report: Path
    seconds: float


@click.command(context_settings=HELP, short_help="All of it on a synthetic dataset, in minutes.")
@click.option(
    "-o", "--output", type=FOLDER, default=Path("demo-output"), show_default=True, help="Folder for everything."
)
@click.option(
    "--weights", type=EXISTING_FILE, help=f"Trained weights of {PRESET} to start from; from nothing by default."
)
def demo(output: Path, weights: Path | None) -> None:
    """Make a dataset, train, export, build an engine, and compare every backend that runs here.

    Ends with tables (backend, precision, AP, difference to PyTorch, largest differences; latency, also by stage) and an
    HTML report with the detections drawn. What cannot run on this machine is a row that says why.
    """
    result = run_demo(output, weights)
    console.print(f"AP of PyTorch {result.ap:.3f}; all of it took {result.seconds / 60:.1f} minutes", highlight=False)
    console.print(f"report: {result.report.resolve()}", soft_wrap=True, highlight=False)


def run_demo(output: Path, weights: Path | None) -> DemoResult:
    """Run every step into `output`; with `weights` training continues from them, without it starts from nothing."""
    began = time.perf_counter()
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such checkpoint; leave --weights out to train from nothing")
    data = output / "data"
    _make_dataset(data, SCRATCH_IMAGES if weights is None else CONTINUE_IMAGES)
    checkpoint = _train(data, output / "run", weights)
    models = [_export(checkpoint, output / name, precision) for name, precision in MODELS.items()]
    engines = [_build(model, model.with_suffix(".engine")) for model in models]
    return _compare(output, data, checkpoint, [*models, *engines], began)


def _make_dataset(data: Path, train_images: int) -> None:
    from asag.train.synthetic import write_synthetic_dataset

    _step(1, f"synthetic dataset: {train_images} images to train on, {VAL_IMAGES} to evaluate on")
    with progress_bar("painting") as advance:
        write_synthetic_dataset(data, train_images=train_images, val_images=VAL_IMAGES, seed=0, progress=advance)


def _train(data: Path, run: Path, weights: Path | None) -> Path:
    import shutil

    from asag.train.config import TrainConfig
    from asag.train.loop import train
    from asag.train.run import CONFIG_FILE

    _step(2, f"training {PRESET} " + ("from nothing" if weights is None else f"on from {weights}"))
    if (run / CONFIG_FILE).is_file():
        shutil.rmtree(run)  # a demo before this one
    recipe = SCRATCH_RECIPE if weights is None else {**CONTINUE_RECIPE, "initial_weights": weights}
    config = TrainConfig.for_preset(PRESET, data, run, evaluation_interval=0, **recipe)
    return train(config).weights


def _export(checkpoint: Path, path: Path, precision: str) -> Path:
    from asag.checkpoint import load_detector
    from asag.deploy import DeployedDetector
    from asag.export.model import export_onnx

    _step(3, f"exporting to ONNX, {precision}")
    with console.status("exporting"):
        report = export_onnx(DeployedDetector(*load_detector(checkpoint)), path, precision)
    console.print(f"{path}: {report.bytes / 1e6:.1f} MB, {report.nodes} nodes", highlight=False)
    console.print(f"ops with a body in the file: {', '.join(report.operations)}", highlight=False)
    return path


def _build(model: Path, path: Path) -> Path | Unavailable:
    """The engine, or the row that says why there is none."""
    from asag.runtime.engines.build import build_engine
    from asag.runtime.errors import BackendUnavailableError, one_line
    from asag.runtime.parity.comparison import Unavailable

    _step(4, f"building a TensorRT-RTX engine from {model.name} (needs no GPU)")
    try:
        with console.status("building"):
            result = build_engine(model, path)
    except BackendUnavailableError as error:
        console.print(f"not built: {error}", style="yellow", highlight=False)
        return Unavailable(path.name, "tensorrt-rtx", MODELS[model.name], one_line(error))
    console.print(f"{path}: {result.engine_bytes / 1e6:.1f} MB in {result.seconds:.1f} s", highlight=False)
    return path


def _compare(
    output: Path, data: Path, checkpoint: Path, candidates: Sequence[Path | Unavailable], began: float
) -> DemoResult:
    from asag.runtime.coco_dataset import open_coco
    from asag.runtime.files import write_json
    from asag.runtime.opening import open_session
    from asag.runtime.parity.comparison import Unavailable, add_stages, compare, open_candidate, parity_table
    from asag.runtime.reports.document import make_document
    from asag.runtime.reports.page import write_page
    from asag.runtime.speed.table import benchmark_table

    _step(5, f"PyTorch against every backend, {VAL_IMAGES} images")
    dataset = open_coco(data)
    opened = [open_candidate(candidate) if isinstance(candidate, Path) else candidate for candidate in candidates]
    with open_session(checkpoint) as reference:
        with progress_bar("comparing") as advance:
            result = compare(reference, opened, dataset, progress=advance)
        with progress_bar("stages") as advance:
            result = add_stages(result, reference, opened, dataset, progress=advance)
        document = make_document(result, dataset, reference=reference, candidates=opened)
        console.print(parity_table(result))
        benchmark = _measure([reference, *(model for model in opened if not isinstance(model, Unavailable))], dataset)
    console.print(benchmark_table(benchmark))
    write_json(output / "parity.json", document.to_json())
    write_json(output / "bench.json", benchmark.to_json())
    report = write_page(output / "report.html", [document], [benchmark], title="ASAG demo")
    reference_result = result.rows[0].result
    assert reference_result is not None
    return DemoResult(reference_result.ap, report, time.perf_counter() - began)


def _measure(sessions: Sequence[Session], dataset: CocoFolder) -> BenchmarkReport:
    """Latency, and the time of each stage."""
    from asag.runtime.speed.benchmark import measure
    from asag.runtime.speed.stage_times import measure_stages

    _step(6, "latency, in turn on the same images")
    pictures = [dataset.load(image_id) for image_id in dataset.image_ids[:8]]
    with progress_bar("measuring") as advance:
        report = measure(sessions, pictures, progress=advance)
    with progress_bar("stages") as advance:
        return dataclasses.replace(report, stage_times=measure_stages(sessions, pictures, progress=advance))


def _step(number: int, text: str) -> None:
    console.print(f"[bold]{number}/6[/bold] {text}", highlight=False)
