"""What a person and a table see of a running training."""

from __future__ import annotations

import csv
import io
import logging
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from asag.runtime.files import write_text
from asag.train.processes import Processes
from asag.training.protocol import Training
from asag.training.timing import shares

logger = logging.getLogger(__name__)

LOSSES_FILE = "losses.csv"
EVALUATIONS_FILE = "evaluations.csv"
EVENTS_FOLDER = "tensorboard"


@dataclass
class Interval:
    """Sums since the last line of the log; tensors stay on their device until the line is made."""

    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    losses: dict[str, Tensor] = field(default_factory=dict)
    gradient_norm: Tensor | float = 0.0

    def add(self, losses: Mapping[str, Tensor], gradient_norm: Tensor, images: int, seconds: float) -> None:
        """Count one step."""
        self.steps += 1
        self.images += images
        self.seconds += seconds
        self.gradient_norm = self.gradient_norm + gradient_norm.detach()
        for name, value in losses.items():
            detached = value.detach()
            self.losses[name] = self.losses[name] + detached if name in self.losses else detached.clone()

    def means(self, processes: Processes) -> dict[str, float]:
        """Mean loss per step by name, over all processes, which must all ask."""
        if not self.losses:
            return {}
        values = processes.mean(torch.stack(list(self.losses.values()))).div(self.steps).tolist()
        return dict(zip(self.losses, values, strict=True))


def group_losses(losses: Mapping[str, float], training: Training) -> dict[str, float]:
    """Weighted losses added up by the part of the training that they belong to; other numbers are left out."""
    groups: dict[str, float] = {}
    for name, part in training.parts.items():
        if name in losses:
            groups[part] = groups.get(part, 0.0) + losses[name] * training.weights[name]
    return groups


class _Table:
    """A CSV file with one row of numbers per step, appended row by row.

    Rows of steps after `step` (an interrupted run went on past its checkpoint) are dropped from an older file.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._columns = _keep_rows(path, step)

    def append(self, row: Mapping[str, float | int]) -> None:
        """Add a row; the first one decides the columns. Raises OSError when it cannot be written."""
        new = self._columns is None
        self._columns = self._columns or list(row)
        cells = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in row.items()}
        with self._path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self._columns, restval="", extrasaction="ignore", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(cells)


class TrainingReport:
    """Progress bar, log lines, ``losses.csv``, ``evaluations.csv`` and TensorBoard events of a run; a context manager.

    With `progress` the bar and the lines go to the terminal, else the lines go to the log only. Of several processes
    the first one writes. `tensorboard` writes events where that package is installed.
    """

    def __init__(
        self,
        folder: Path,
        training: Training,
        total_steps: int,
        step: int,
        progress: bool,
        processes: Processes | None = None,
        tensorboard: bool = False,
    ) -> None:
        self._training, self._total, self._start = training, total_steps, step
        self._processes = processes or Processes()
        self._interval = Interval()
        self._began = time.perf_counter()
        self.last_losses: dict[str, float] = {}
        main = self._processes.is_main
        progress = progress and main
        self._losses = _Table(folder / LOSSES_FILE, step) if main else None
        self._evaluations = _Table(folder / EVALUATIONS_FILE, step) if main else None
        self._events = _open_events(folder / EVENTS_FOLDER, step) if main and tensorboard else None
        self._progress = Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            disable=not progress,
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task("training", total=total_steps, completed=step, note="")

    def __enter__(self) -> TrainingReport:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._events is not None:
            self._events.close()

    def say(self, line: str) -> None:
        """One line for a person, above the progress bar."""
        if not self._processes.is_main:
            return
        if self._progress.disable:
            logger.info("%s", line)
        else:
            self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def step(self, losses: Mapping[str, Tensor], gradient_norm: Tensor, images: int, seconds: float) -> None:
        """Count one finished step of `images` images that took `seconds`."""
        self._interval.add(losses, gradient_norm, images, seconds)
        self._progress.advance(self._task)

    def line(self, step: int, epoch: int, learning_rate: float, seconds: Mapping[str, float] | None = None) -> None:
        """Write the means since the last line to the log and to the table; nothing when there was no step.

        `seconds` are those of the parts of a step. All processes must call.
        """
        interval, self._interval = self._interval, Interval()
        if not interval.steps:
            return
        means = interval.means(self._processes)
        parts = group_losses(means, self._training)
        total, speed = sum(parts.values()), interval.images / max(interval.seconds, 1e-9)
        gradient_norm = float(interval.gradient_norm) / interval.steps
        self.last_losses = {"total": total, **means}
        per_step = (time.perf_counter() - self._began) / max(step - self._start, 1)
        left = timedelta(seconds=round(per_step * (self._total - step)))
        detail = " + ".join(f"{name} {value:.2f}" for name, value in parts.items())
        memory = peak_memory()
        spent = shares(seconds or {})
        times = f" ({', '.join(f'{name} {share:.0%}' for name, share in spent.items())})" if spent else ""
        self.say(
            f"step {step:>{len(str(self._total))}}/{self._total}  epoch {epoch}  loss {total:.2f} ({detail})"
            f"  gradient {gradient_norm:.1f}  lr {learning_rate:.2e}  {speed:.1f} images/s{times}"
            f"  memory {memory / 2**30:.2f} GiB  left {left}"
        )
        self._progress.update(self._task, note=f"loss {total:.2f}, {speed:.1f} images/s")
        row = {
            "step": step,
            "epoch": epoch,
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "images_per_second": speed,
            "memory_gib": memory / 2**30,
            **{f"share_{name}": share for name, share in spent.items()},
            "total": total,
            **means,
        }
        self._write(self._losses, "training", row)

    def evaluation(self, step: int, images: int, values: Mapping[str, float]) -> None:
        """Write the results of an evaluation to their table."""
        self._write(self._evaluations, "validation", {"step": step, "images": images, **values})

    def picture(self, path: Path, step: int) -> None:
        """Show a picture's file in TensorBoard."""
        if self._events is not None:
            with Image.open(path) as image:
                self._events.add_image("detections", np.asarray(image), step, dataformats="HWC")

    def _write(self, table: _Table | None, group: str, row: Mapping[str, float | int]) -> None:
        """A row to a table and to TensorBoard; a disk that is full is reported, and training goes on."""
        if table is None:
            return
        try:
            table.append(row)
            if self._events is not None:
                for name, value in row.items():
                    if name != "step":
                        self._events.add_scalar(f"{group}/{name}", value, int(row["step"]))
        except OSError as error:
            self.say(f"a row of step {row['step']} could not be written ({error.strerror or error})")


def peak_memory() -> int:
    """Bytes at most used so far: of the GPU's memory by torch, or by this process where torch uses no GPU."""
    if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
        return int(allocated)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _open_events(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where it is not installed; events after `step` of an older run are hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step + 1 if step else None)


def _keep_rows(table: Path, step: int) -> list[str] | None:
    """Drop the rows after `step` from an older table; its columns, or None when a new table begins."""
    if step == 0 or not table.is_file():
        table.unlink(missing_ok=True)
        return None
    with table.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        columns = list(reader.fieldnames or ())
        rows = [row for row in reader if (row.get("step") or "").isdecimal() and int(row["step"]) <= step]
    if not columns:
        return None
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(table, text.getvalue())
    return columns
