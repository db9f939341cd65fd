"""What a fixed input costs in average precision: `python -m benchmarks.padding_cost CHECKPOINT --data FOLDER`.

A checkpoint runs on the same images three times: at their own size without any padding; with zeros around them, as
large as the fixed input; and as an exported file sees them, where an image that does not fit (an upright one in a wide
input) is shrunk as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from asag.runtime.coco_dataset import CocoFolder, open_coco
from asag.runtime.coco_evaluation import CocoResult, evaluate
from asag.runtime.coco_file import Id
from asag.runtime.machine import describe_machine
from asag.runtime.metadata import ModelMetadata
from asag.runtime.opening import open_session
from asag.runtime.parity.agreement import compare_detections
from asag.runtime.postprocessing import Detections, postprocess
from asag.runtime.preprocessing import prepare, resized_size
from asag.runtime.session import Session

CONFIDENT = 0.3


@dataclasses.dataclass(frozen=True)
class InputRow:
    """Results with one way of making the input. ``kept`` is the share of the first way's confident detections (score at
    least 0.3) that are found again, same class and IoU at least one half; None where there are none, and for the first.
    """

    name: str
    result: CocoResult
    kept: float | None


@dataclasses.dataclass(frozen=True)
class PaddingCost:
    """The three rows, and how many images had to shrink to fit the fixed input."""

    rows: tuple[InputRow, ...]
    shrunk: int
    images: int
    input_size: tuple[int, int]


def native_size(image: Image.Image, metadata: ModelMetadata) -> tuple[int, int]:
    """(height, width) of the image as the method resizes it, whatever the fixed input is."""
    return resized_size(image.height, image.width, metadata.shorter_side, metadata.longer_side)


def padded_size(native: tuple[int, int], fixed: tuple[int, int]) -> tuple[int, int]:
    """An input as large as ``fixed``, turned where the image is upright, and never smaller than the image."""
    turned = fixed if (native[0] <= native[1]) == (fixed[0] <= fixed[1]) else fixed[::-1]
    return max(native[0], turned[0]), max(native[1], turned[1])


def measure_padding(
    session: Session,
    dataset: CocoFolder,
    image_ids: Sequence[Id] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PaddingCost:
    """Run a PyTorch session, whose input size is free, on the images in the three ways."""
    session.check_stages()
    dataset = dataset.for_model(session.metadata)
    image_ids = dataset.image_ids if image_ids is None else image_ids
    fixed = session.metadata.input_size
    names = ("own size", "padded to the fixed size", f"fixed {fixed[0]}x{fixed[1]}")
    found: list[dict[Id, Detections]] = [{} for _ in names]
    shrunk = 0
    for number, image_id in enumerate(image_ids, start=1):
        image = dataset.load(image_id)
        native = native_size(image, session.metadata)
        shrunk += native[0] > fixed[0] or native[1] > fixed[1]
        for index, size in enumerate((native, padded_size(native, fixed), fixed)):
            found[index][image_id] = _detect(session, image, size)
        if progress is not None:
            progress(number, len(image_ids))
    rows = tuple(
        InputRow(name, evaluate(dataset, detections), None if index == 0 else _kept(found[0], detections))
        for index, (name, detections) in enumerate(zip(names, found, strict=True))
    )
    return PaddingCost(rows, shrunk, len(image_ids), fixed)


def _detect(session: Session, image: Image.Image, size: tuple[int, int]) -> Detections:
    metadata = dataclasses.replace(session.metadata, input_height=size[0], input_width=size[1])
    outputs = session.run(prepare([image], metadata))
    return postprocess(outputs, [(image.height, image.width)], metadata)[0]


def _kept(reference: Mapping[Id, Detections], other: Mapping[Id, Detections]) -> float | None:
    matched = confident = 0
    for image_id, expected in reference.items():
        wanted = expected.above(CONFIDENT)
        agreement = compare_detections(image_id, wanted, other[image_id], len(other[image_id]) + 1)
        matched += agreement.matched
        confident += len(wanted)
    return matched / confident if confident else None


def padding_table(cost: PaddingCost) -> Table:
    """The rows for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=f"The same weights on {cost.images} images")
    for heading in ("input", "AP", "difference", "AP50", "found again"):
        table.add_column(heading, justify="left" if heading == "input" else "right", no_wrap=True)
    first = cost.rows[0].result.ap
    for index, row in enumerate(cost.rows):
        table.add_row(
            row.name,
            f"{row.result.ap:.4f}",
            "" if index == 0 else f"{row.result.ap - first:+.4f}",
            f"{row.result.ap50:.4f}",
            "" if row.kept is None else f"{row.kept:.1%}",
        )
    return table


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Dataset in COCO's layout.")
@click.option("--split", default="val2017", show_default=True, help="Which images of the dataset.")
@click.option("--images", type=click.IntRange(1), help="Only the first images of the split.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
def main(checkpoint: Path, data: Path, split: str, images: int | None, threads: int | None) -> None:
    """Measure what padding to CHECKPOINT's fixed input size costs."""
    console = Console()
    dataset = open_coco(data, split)
    with open_session(checkpoint, threads=threads) as session, console.status("measuring") as status:
        cost = measure_padding(
            session,
            dataset,
            dataset.image_ids[:images],
            lambda done, count: status.update(f"image {done} of {count}"),
        )
    console.print(padding_table(cost))
    height, width = cost.input_size
    console.print(f"{cost.shrunk} of {cost.images} images had to shrink to fit {height}x{width}", highlight=False)
    console.print(describe_machine().summary(), style="dim")


if __name__ == "__main__":
    main()
