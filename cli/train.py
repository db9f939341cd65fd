"""`asag train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from asag.cli.console import DATASET, EXISTING_FILE, FOLDER, HELP, console

DEFAULT_PRESET = "asag-a-r50-1x-100"


@click.command(context_settings=HELP, short_help="Train a detector on a dataset.")
@click.option("--preset", help=f"Which detector; `asag zoo` lists them.  [default: {DEFAULT_PRESET}]")
@click.option(
    "--data",
    type=DATASET,
    help="Dataset in COCO's, YOLO's or Pascal VOC's layout, with images to train and to evaluate on.",
)
@click.option("--train-annotations", type=EXISTING_FILE, help="COCO-format file to train on, instead of the folder's.")
@click.option("--train-images", type=FOLDER, help="Folder of its images.  [default: the file's folder]")
@click.option("--val-annotations", type=EXISTING_FILE, help="COCO-format file to evaluate on, instead of the folder's.")
@click.option("--val-images", type=FOLDER, help="Folder of its images.  [default: the file's folder]")
@click.option("-o", "--output", type=FOLDER, help="Folder of the run; must not hold another one.")
@click.option(
    "--config", "config_file", type=EXISTING_FILE, help="YAML or JSON file of options, or the config.json of a run."
)
@click.option("--resume", is_flag=True, help="Continue the run in the output folder from its last checkpoint.")
@click.option("--weights", type=EXISTING_FILE, help="Start from this checkpoint (.safetensors) of the same preset.")
@click.option(
    "--backbone-weights",
    type=EXISTING_FILE,
    help="Start the backbone from ImageNet weights (torchvision's or CrossCL's names).",
)
@click.option("--epochs", type=float, help="Passes over the training images.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps in all, instead of epochs.")
@click.option("--batch-size", type=click.IntRange(1), help="Images of one step, over all processes.")
@click.option("--accumulate", type=click.IntRange(1), help="Pieces that each process cuts its images of a step into.")
@click.option("--learning-rate", type=float, help="AdamW's rate for everything but the backbone.")
@click.option("--backbone-learning-rate", type=float, help="AdamW's rate for the backbone.")
@click.option("--workers", type=click.IntRange(0), help="Processes that read images, for each training process.")
@click.option("--device", help="cpu, cuda, or auto for a GPU where there is one.  [default: auto]")
@click.option("--seed", type=click.IntRange(0), help="Source of every random draw.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any other field of the run's config.json."
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def train(
    preset: str | None,
    data: Path | None,
    output: Path | None,
    config_file: Path | None,
    weights: Path | None,
    settings: tuple[str, ...],
    resume: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a detector and write its weights.

    The defaults are the recipe of the preset; a file given with --config replaces them, and what stands on the command
    line wins over the file. The output folder gets weights.safetensors (for `asag export`), best.safetensors, the last
    states (to resume), losses.csv, pictures of the detections and config.json; a run that was interrupted continues
    with --resume and, on a CPU, ends with the same weights.

    \b
    Train the published recipe on COCO, on 8 GPUs:
        torchrun --nproc-per-node 8 --no-python asag train \\
            --data coco --backbone-weights resnet50.pth -o runs/coco
    Train the small preset on own images for 2000 steps:
        asag train --preset asag-a-tiny --data own --steps 2000 -o runs/own
    Repeat a run:
        asag train --config runs/own/config.json
    """
    given = {"preset": preset, "data": data, "output": output, **options, "initial_weights": weights}
    given["resume"] = resume or None
    config = resolve_config(config_file, given, _parse_settings(settings))
    for start in (config.initial_weights, config.backbone_weights):
        if start is not None and not Path(start).is_file():
            raise FileNotFoundError(f"{start}: no such file")
    # These import PyTorch, which takes seconds; what is wrong with the options was said before.
    from asag.train.loop import train as run
    from asag.train.processes import is_main_process

    main = is_main_process()
    result = run(config, progress=not quiet and main)
    if not main:
        return
    measured = result.crowdhuman or result.evaluation
    ap = f" (AP {measured.ap:.3f})" if measured is not None else ""
    console.print(f"weights: {result.weights}{ap}", soft_wrap=True)
    if result.best is not None:
        console.print(f"best:    {result.best} (AP {result.best_score:.3f})", soft_wrap=True)
    if result.finished:
        console.print(f"next: asag export {result.weights} -o {result.output / 'model.onnx'}", soft_wrap=True)


def resolve_config(config_file: Path | None, given: dict[str, Any], settings: dict[str, Any] | None = None) -> Any:
    """The TrainConfig of a file's values with the given ones, where they are not None, and the settings on top.

    A setting of None counts: it takes away what the file or the recipe says. Raises click.UsageError where data or
    output are named by neither, and what reading the file raises.
    """
    from asag.train.config import TrainConfig
    from asag.train.config_file import read_config_file

    values = read_config_file(config_file) if config_file is not None else {}
    given = {name: value for name, value in given.items() if value is not None} | (settings or {})
    if "epochs" in given and "steps" not in given:
        values["steps"] = None
    if given.get("resume") and config_file is not None and "output" not in given:
        raise click.UsageError("to resume with --config, name the run's folder with --output")
    values |= given
    if values.get("data") is None and values.get("train_annotations") is None:
        raise click.UsageError("nothing to train on: give --data or --train-annotations")
    if values.get("output") is None:
        raise click.UsageError("where to? give --output")
    preset, data, output = values.pop("preset", DEFAULT_PRESET), values.pop("data", None), values.pop("output")
    config = TrainConfig.for_preset(preset, data, output, **values)
    # What a file says is none stays none, whatever the recipe.
    none: dict[str, Any] = {name: None for name, value in values.items() if value is None}
    return config.replaced(**none)


def _parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """`NAME=VALUE` pairs as fields of the training configuration; values are JSON, or text where they are not."""
    import json

    from asag.train.config import option_names

    known = option_names() - {"preset", "data", "output"}
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
