"""What a person looks at while a detector trains: its detections on a few images, and the curves of a run."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.coco_file import Id
from asag.runtime.contact_sheet import to_cell, write_sheet
from asag.runtime.drawing import draw_detections
from asag.runtime.files import atomic_path
from asag.runtime.metadata import ModelMetadata
from asag.runtime.postprocessing import Detections
from asag.train.reporting import group_losses
from asag.training.protocol import Training

PICTURES = 9
_SCORE = 0.3


def pictured_images(validation: CocoFolder) -> tuple[Id, ...]:
    """Ids of a few images spread evenly over the validation images; always the same ones."""
    ids = validation.image_ids
    step = max(1, len(ids) // PICTURES)
    return ids[::step][:PICTURES]


def write_grid(
    path: Path, validation: CocoFolder, detections: Mapping[Id, Detections], metadata: ModelMetadata
) -> None:
    """Write a grid of the images with their detections drawn (score 0.3 and more), as a JPEG."""
    cells = []
    for image_id, found in detections.items():
        cell = to_cell(validation.load(image_id))
        cells.append(draw_detections(cell, found, metadata, _SCORE))
    write_sheet(path, cells)


def write_curves(path: Path, losses: Path, evaluations: Path, training: Training) -> bool:
    """Plot the losses, the learning rate and the evaluations of a run's tables; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = read_table(losses)
    if not rows:
        return False
    evaluated = read_table(evaluations)
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(3 if evaluated else 2, 1, sharex=True, squeeze=False)[:, 0]
    steps = [row["step"] for row in rows]
    axes[0].plot(steps, [row["total"] for row in rows], color="black", label="total, weighted")
    parts = [group_losses(row, training) for row in rows]
    for part in dict.fromkeys(name for row in parts for name in row):
        axes[0].plot(steps, [row.get(part, math.nan) for row in parts], linewidth=0.9, label=part)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("loss")
    axes[0].legend(fontsize="x-small", ncols=2)
    axes[1].plot(steps, [row["learning_rate"] for row in rows])
    axes[1].set_ylabel("learning rate")
    if evaluated:
        for name in evaluated[0]:
            if name not in ("step", "images"):
                values = [row.get(name, math.nan) for row in evaluated]
                axes[2].plot([row["step"] for row in evaluated], values, "o-", markersize=3, label=name)
        axes[2].set_ylabel("validation")
        axes[2].legend(fontsize="x-small", ncols=3)
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return True


def read_table(path: Path) -> list[dict[str, float]]:
    """The rows of a table of numbers; without the cells that are empty. No rows without the file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [_numbers(row) for row in csv.DictReader(stream)]


def _numbers(row: Mapping[str, str | None]) -> dict[str, float]:
    return {name: float(text) for name, text in row.items() if text}
