"""What a person and a table see of a running training."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from runtime.files import write_text

logger = logging.getLogger(__name__)

LOSSES_FILE = "losses.csv"
_GROUPS = {"anchors": "_anchor", "proposals": "_rpn"}  # name in the log line: suffix of the losses


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

    def means(self) -> dict[str, float]:
        """Mean loss per step by name."""
        if not self.losses:
            return {}
        values = torch.stack(list(self.losses.values())).div(self.steps).tolist()
        return dict(zip(self.losses, values, strict=True))


def group_losses(means: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Weighted losses added up by part: anchors, proposals, heads and, where there are some, noised queries."""
    groups: dict[str, float] = {}
    for name, value in means.items():
        part = next((part for part, suffix in _GROUPS.items() if name.endswith(suffix)), "heads")
        part = "denoising" if name.startswith("dn_") else part
        groups[part] = groups.get(part, 0.0) + value * weights[name]
    return groups


class TrainingReport:
    """Progress bar, log lines and ``losses.csv`` of a run; a context manager.

    With `progress` the bar and the lines go to the terminal, else the lines go to the log only. Rows of steps after
    `step` (an interrupted run went on past its checkpoint) are dropped from an older table.
    """

    def __init__(self, folder: Path, weights: Mapping[str, float], total_steps: int, step: int, progress: bool) -> None:
        self._table, self._weights, self._total, self._start = folder / LOSSES_FILE, weights, total_steps, step
        self._interval = Interval()
        self._began = time.perf_counter()
        self.last_losses: dict[str, float] = {}
        self._columns = _keep_rows(self._table, step)
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

    def say(self, line: str) -> None:
        """One line for a person, above the progress bar."""
        if self._progress.disable:
            logger.info("%s", line)
        else:
            self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def step(self, losses: Mapping[str, Tensor], gradient_norm: Tensor, images: int, seconds: float) -> None:
        """Count one finished step of `images` images that took `seconds`."""
        self._interval.add(losses, gradient_norm, images, seconds)
        self._progress.advance(self._task)

    def line(self, step: int, epoch: int, learning_rate: float) -> None:
        """Write the means since the last line to the log and to the table; nothing when there was no step."""
        interval, self._interval = self._interval, Interval()
        if not interval.steps:
            return
        means = interval.means()
        parts = group_losses(means, self._weights)
        total, speed = sum(parts.values()), interval.images / max(interval.seconds, 1e-9)
        gradient_norm = float(interval.gradient_norm) / interval.steps
        self.last_losses = {"total": total, **means}
        per_step = (time.perf_counter() - self._began) / max(step - self._start, 1)
        left = timedelta(seconds=round(per_step * (self._total - step)))
        detail = " + ".join(f"{name} {value:.2f}" for name, value in parts.items())
        self.say(
            f"step {step:>{len(str(self._total))}}/{self._total}  epoch {epoch}  loss {total:.2f} ({detail})"
            f"  gradient {gradient_norm:.1f}  lr {learning_rate:.2e}  {speed:.1f} images/s  left {left}"
        )
        self._progress.update(self._task, note=f"loss {total:.2f}, {speed:.1f} images/s")
        row = {
            "step": step,
            "epoch": epoch,
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "images_per_second": speed,
            "total": total,
            **means,
        }
        self._append({name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in row.items()})

    def _append(self, row: dict[str, str]) -> None:
        new = self._columns is None
        self._columns = self._columns or list(row)
        with self._table.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self._columns, restval="", extrasaction="ignore", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


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
