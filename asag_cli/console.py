"""What every command shares: the terminal, progress bars, and parsing of sizes and lists."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

console = Console()

HELP = {"help_option_names": ["-h", "--help"]}
"""Settings of every command, so that each has the same help options however it is called."""

ProgressCallback = Callable[[int, int], None]


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


class IntegersType(click.ParamType):
    """A fixed number of whole numbers with a separator, such as 1:4:16."""

    def __init__(self, count: int, separator: str, name: str) -> None:
        self.count, self.separator, self.name = count, separator, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse the text; a tuple is taken as it is."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(self.separator)
        if len(parts) != self.count or not all(part.isdecimal() for part in parts):
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)
        return tuple(int(part) for part in parts)


EXISTING_FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
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


def variant_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--head` and `--levels`, for commands that take a checkpoint; exported files have theirs fixed."""
    head = click.option(
        "--head",
        type=click.Choice(["main", "aux_0", "aux_1", "aux_2"]),
        help="Which of a checkpoint's trained heads; the preset's by default.",
    )
    levels = click.option(
        "--levels",
        type=click.Choice(["P3P6", "P4P6", "P5P6"]),
        help="Which levels a checkpoint explores: fewer are faster and miss small objects; the preset's by default.",
    )
    return head(levels(command))
