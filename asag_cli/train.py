"""`asag train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from asag_cli.console import EXISTING_FILE, FOLDER, console


@click.command(short_help="Train a detector on a dataset in COCO's layout.")
@click.option("--preset", default="asag-a-r50-1x-100", show_default=True, help="Which detector; `asag zoo` lists them.")
@click.option(
    "--data",
    type=FOLDER,
    required=True,
    help="Folder with annotations/instances_train2017.json, train2017/, and the same for val2017.",
)
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of the run; must not hold another one.")
@click.option("--resume", is_flag=True, help="Continue the run in the output folder from its last checkpoint.")
@click.option("--weights", type=EXISTING_FILE, help="Start from this checkpoint (.safetensors) of the same preset.")
@click.option(
    "--backbone-weights", type=EXISTING_FILE, help="Start the backbone from ImageNet weights (torchvision's names)."
)
@click.option("--epochs", type=float, help="Passes over the training images.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps in all, instead of epochs.")
@click.option("--batch-size", type=click.IntRange(1), help="Images of one step.")
@click.option("--learning-rate", type=float, help="AdamW's rate for everything but the backbone.")
@click.option("--backbone-learning-rate", type=float, help="AdamW's rate for the backbone.")
@click.option("--workers", type=click.IntRange(0), help="Processes that read images.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto for a GPU where there is one.")
@click.option("--seed", type=click.IntRange(0), help="Source of every random draw.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any other field of the run's config.json."
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def train(
    preset: str, data: Path, output: Path, weights: Path | None, settings: tuple[str, ...], quiet: bool, **options: Any
) -> None:
    """Train a detector and write its weights.

    The defaults are the recipe of the preset. The output folder gets weights.safetensors (for `asag export`), state.pt
    (to resume), losses.csv and config.json; a run that was interrupted continues with --resume and, on a CPU, ends
    with the same weights. When it is done the model is evaluated on the validation images.

    \b
    Train the published recipe on COCO:
        asag train --data coco --backbone-weights resnet50.pth -o runs/coco
    Fine-tune the small preset on own images for 2000 steps:
        asag train --preset asag-a-tiny --data own --steps 2000 -o runs/own
    """
    from train.config import TrainConfig
    from train.loop import train as run

    overrides = {**options, "initial_weights": weights, **_parse_settings(settings)}
    config = TrainConfig.for_preset(preset, data, output, **overrides)
    result = run(config, progress=not quiet)
    console.print(f"weights: {result.weights}")
    if result.finished:
        console.print(f"next: asag export {result.weights} -o {result.output / 'model.onnx'}")


def _parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """`NAME=VALUE` pairs as fields of the training configuration; values are JSON, or text where they are not."""
    import json

    from train.config import TrainConfig

    known = {field.name for field in dataclasses.fields(TrainConfig)} - {"preset", "data", "output"}
    values = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or name not in known:
            raise click.BadParameter(
                f"{setting!r}: write NAME=VALUE with a NAME of {', '.join(sorted(known))}", param_hint="--set"
            )
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values
