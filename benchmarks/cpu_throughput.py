"""What `detect` gains on a folder of images on this CPU: `python -m benchmarks.cpu_throughput --images FOLDER`.

PyTorch eager handles one image after another, from the file to its detections; `detect` reads ahead and runs
two batches beside one another. The variants take turns within each round, on the same images.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from asag.runtime.image_source import images_in
from asag.runtime.machine import describe_machine
from asag.runtime.postprocessing import Detections, postprocess
from asag.runtime.preprocessing import load_image, prepare
from asag.runtime.session import Session
from asag.runtime.speed.benchmark import ratio_of
from benchmarks.cpu_speed import open_variants, random_checkpoint

CONTEXTS = 2
"""Batches at once, as `asag detect` has them on several images."""


@dataclass(frozen=True)
class FolderTimes:
    """Seconds per image of a variant in each round: on the clock, and of all its threads on the processor."""

    name: str
    wall: tuple[float, ...]
    processor: tuple[float, ...]


def one_by_one(session: Session, paths: Sequence[Path]) -> list[Detections]:
    """Detections of each image, which is read, prepared and run when the one before is done."""
    found = []
    for path in paths:
        image = load_image(path)
        outputs = session.run(prepare([image], session.metadata))
        found += postprocess(outputs, [(image.height, image.width)], session.metadata)
    return found


def measure_folder(
    variants: dict[str, Callable[[Sequence[Path]], object]], paths: Sequence[Path], *, rounds: int, images: int
) -> list[FolderTimes]:
    """Time each variant once a round, in rotating order, after one round that does not count.

    A round takes the next `images` of `paths`, which start over at their end.
    """
    times = np.zeros((rounds, len(variants), 2))
    names = list(variants)
    for number in range(-1, rounds):
        some = [paths[index % len(paths)] for index in range((number + 1) * images, (number + 2) * images)]
        for offset in range(len(names)):
            index = (number + offset) % len(names)
            wall, processor = time.perf_counter(), time.process_time()
            variants[names[index]](some)
            if number >= 0:
                times[number, index] = time.perf_counter() - wall, time.process_time() - processor
    times /= images
    return [
        FolderTimes(name, tuple(times[:, index, 0].tolist()), tuple(times[:, index, 1].tolist()))
        for index, name in enumerate(names)
    ]


def compare_on_folder(
    checkpoint: Path,
    folder: Path,
    paths: Sequence[Path],
    *,
    rounds: int,
    images: int,
    threads: int | None,
) -> list[FolderTimes]:
    """Export `checkpoint` into `folder` and time PyTorch one by one, without and with folded norms, and `detect`."""
    _, sessions = open_variants(checkpoint, folder, threads=threads, contexts=CONTEXTS)
    unfolded, folded, exported = sessions
    variants: dict[str, Callable[[Sequence[Path]], object]] = {
        "PyTorch eager, norms as trained, one by one": lambda some: one_by_one(unfolded, some),
        "PyTorch eager, norms folded, one by one": lambda some: one_by_one(folded, some),
        "ONNX Runtime, detect": exported.detect,
    }
    try:
        return measure_folder(variants, paths, rounds=rounds, images=images)
    finally:
        exported.close()


def throughput_table(found: Sequence[FolderTimes]) -> Table:
    """A row for each variant; the last one's throughput over each, as median and 10th to 90th percentile of rounds."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("variant", overflow="fold")
    for heading in ("images\n/s", "CPU s\n/image", "detect's\nthroughput / it"):
        table.add_column(heading, justify="right", no_wrap=True)
    for times in found:
        middle, low, high = ratio_of(times.wall, found[-1].wall)
        table.add_row(
            times.name,
            f"{1 / float(np.median(times.wall)):.2f}",
            f"{float(np.median(times.processor)):.2f}",
            f"{middle:.2f} ({low:.2f}..{high:.2f})",
        )
    return table


@click.command()
@click.option("--images", "source", type=click.Path(path_type=Path, file_okay=False), required=True, help="A folder.")
@click.option("--checkpoint", type=click.Path(path_type=Path, dir_okay=False), help="Random weights by default.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Measured turns of each variant.")
@click.option("--images-per-round", type=click.IntRange(1), default=8, show_default=True, help="Images of one turn.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; each backend's choice by default.")
def main(source: Path, checkpoint: Path | None, rounds: int, images_per_round: int, threads: int | None) -> None:
    """Images per second of ResNet-50 at 800x1216 with 200 query places, from files to detections."""
    console = Console()
    paths = images_in(source)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = checkpoint or random_checkpoint(folder)
        found = compare_on_folder(weights, folder, paths, rounds=rounds, images=images_per_round, threads=threads)
    console.print(throughput_table(found))
    console.print(f"{rounds} rounds of {images_per_round} images; {describe_machine().summary()}", highlight=False)


if __name__ == "__main__":
    main()
