"""What every command shares: the terminal, progress bars, and parsing of sizes and lists."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from asag.runtime.coco_dataset import CocoFolder

console = Console()

HELP = {"help_option_names": ["-h", "--help"]}
"""Settings of every command, so that each has the same help options however it is called."""

ProgressCallback = Callable[[int, int], None]


def check_ending(output: Path, ending: str) -> None:
    """click.BadParameter unless a file that is to be written has the ending of its kind."""
    if output.suffix.lower() != ending:
        raise click.BadParameter(f"{output} should end in {ending}", param_hint="--output")


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[ProgressCallback]:
    """A bar with counts and remaining time; yields the callback that moves it, called with (done, all)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance


@contextlib.contextmanager
def phase_bars() -> Iterator[Callable[[str, float], None]]:
    """A bar for each phase of a job; yields the callback that moves them, called with (phase, fraction done)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def advance(phase: str, fraction: float) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=1.0)
            progress.update(tasks[phase], completed=fraction)

        yield advance


class SizeType(click.ParamType):
    """`HEIGHTxWIDTH` in pixels, such as 800x1344."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse the text; a tuple is taken as it is."""
        if isinstance(value, tuple):
            return value
        parts = str(value).lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            self.fail(f"{value!r} is no size; write HEIGHTxWIDTH, such as 800x1344", param, ctx)
        return int(parts[0]), int(parts[1])


class ValueType(click.ParamType):
    """A number or a text, or several numbers with commas between them; the family checks what it is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text; anything else is taken as it is."""
        if not isinstance(value, str):
            return value
        try:
            numbers = json.loads(f"[{value}]")
        except ValueError:
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)
        return numbers if len(numbers) > 1 else numbers[0]


EXISTING_FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
DATASET = click.Path(path_type=Path)
"""A data set's folder, or the file that names its folders; the reader says what it looked for."""
OUTPUT_FILE = click.Path(path_type=Path, dir_okay=False)


def device_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--device`, for commands that run a model."""
    return click.option(
        "--device", default="cpu", show_default=True, help="cpu, cuda, cuda:INDEX; for .onnx files tensorrt."
    )(command)


def threads_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--threads`, for commands that run a model on the CPU."""
    return click.option("--threads", type=click.IntRange(1), help="CPU threads; the backend's choice by default.")(
        command
    )


@dataclass(frozen=True)
class DatasetChoice:
    """What the options of :func:`dataset_options` name; `folder` may be None where the command allows that."""

    folder: Path | None
    split: str
    images: int | None
    classes: tuple[str, ...]
    stored_pixels: bool

    def open(self) -> CocoFolder:
        """The data set. Raises what :func:`runtime.coco_dataset.open_coco` raises."""
        from asag.runtime.coco_dataset import open_coco

        assert self.folder is not None
        return open_coco(self.folder, self.split, self.stored_pixels)


def dataset_options(required: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--data` and what belongs to it, given to the command as one `dataset`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_dataset(
            data: Path | None,
            split: str,
            images: int | None,
            classes: tuple[str, ...],
            stored_pixels: bool,
            **options: Any,
        ) -> Any:
            names = tuple(name for listed in classes for name in listed.split(","))
            return command(dataset=DatasetChoice(data, split, images, names, stored_pixels), **options)

        for option in (
            click.option(
                "--stored-pixels", is_flag=True, help="Read pictures as stored, whatever their EXIF orientation says."
            ),
            click.option("--classes", multiple=True, help="Only these classes count: names, with commas between them."),
            click.option("--images", type=click.IntRange(1), help="Only the first images of the split."),
            click.option(
                "--split",
                default="val2017",
                show_default=True,
                help="Which images; for val2017 also valid or val, as labelling tools call them.",
            ),
            click.option("--data", type=DATASET, required=required, help="Dataset in COCO's, YOLO's or VOC's layout."),
        ):
            with_dataset = option(with_dataset)
        return with_dataset

    return decorate


def choice_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for whatever the families let a checkpoint be deployed with, given to the command as `choices`.

    Exported files have theirs fixed; the default of each is the checkpoint's own.
    """
    from asag.families import FAMILIES

    known = {choice.name: choice for family in FAMILIES for choice in family.choices}

    @functools.wraps(command)
    def with_choices(**options: Any) -> Any:
        return command(choices={name: options.pop(name) for name in known}, **options)

    for choice in reversed(known.values()):
        kind: click.ParamType = click.Choice(choice.values) if choice.values else ValueType(choice.form)
        text = f"{choice.help} The checkpoint's own by default."
        with_choices = click.option(f"--{choice.name.replace('_', '-')}", choice.name, type=kind, help=text)(
            with_choices
        )
    return with_choices
