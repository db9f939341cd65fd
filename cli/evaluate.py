"""`asag evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from asag.cli.console import (
    EXISTING_FILE,
    HELP,
    OUTPUT_FILE,
    DatasetChoice,
    SizeType,
    choice_options,
    console,
    dataset_options,
    device_option,
    progress_bar,
    threads_option,
)


@click.command(context_settings=HELP, short_help="COCO average precision of a model.")
@click.argument("model", type=EXISTING_FILE)
@dataset_options()
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Images that run together.")
@click.option("--input-size", type=SizeType(), help="Input of a .safetensors model; other files have theirs fixed.")
@click.option(
    "--predictions",
    type=OUTPUT_FILE,
    help="Also write the detections in COCO's results format, with the dataset's ids.",
)
@click.option("--per-class", is_flag=True, help="Also show AP and AR of every class.")
@click.option(
    "--max-detections",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Detections of an image and class that count.",
)
@click.option("--json", "json_path", type=OUTPUT_FILE, help="Also write the result to this file.")
@choice_options
@device_option
@threads_option
def evaluate(
    model: Path,
    dataset: DatasetChoice,
    batch_size: int,
    input_size: tuple[int, int] | None,
    per_class: bool,
    max_detections: int,
    predictions: Path | None,
    json_path: Path | None,
    choices: dict[str, Any],
    device: str,
    threads: int | None,
) -> None:
    """Evaluate MODEL (.onnx, .engine or .safetensors) with COCO's average precision."""
    from rich.table import Column, Table

    from asag.runtime.coco_evaluation import evaluate_session, results
    from asag.runtime.files import write_json
    from asag.runtime.opening import open_session

    folder = dataset.open()
    with open_session(model, device=device, threads=threads, input_size=input_size, choices=choices) as session:
        with progress_bar("evaluating") as advance:
            result, found = evaluate_session(
                session,
                folder,
                folder.image_ids[: dataset.images],
                batch_size,
                advance,
                dataset.classes,
                max_detections,
            )
        metadata = session.metadata
        title = f"{model.name} ({session.backend}, {session.precision}) on {result.images} images"
    values = result.to_json()
    table = Table(title=title)
    names = [name for name in values if name not in ("images", "classes")]
    for name in names:
        table.add_column(name, justify="right")
    table.add_row(*(_cell(values[name]) for name in names))
    console.print(table)
    if per_class:
        table = Table("class", *(Column(name, justify="right") for name in ("objects", "ap", "ap50", "ar")))
        for row in values["classes"]:
            table.add_row(row["name"], str(row["objects"]), *(_cell(row[name]) for name in ("ap", "ap50", "ar")))
        console.print(table)
    if predictions is not None:
        write_json(predictions, results(folder.for_model(metadata, dataset.classes), found), indent=None)
    if json_path is not None:
        write_json(json_path, {"model": str(model), "dataset": str(dataset.folder), "split": dataset.split, **values})


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
