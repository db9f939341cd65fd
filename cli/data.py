"""`asag data`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from asag.cli.console import DATASET, EXISTING_FILE, FOLDER, HELP, OUTPUT_FILE, console, progress_bar

if TYPE_CHECKING:
    from asag.runtime.dataset_check import DatasetCheck


@click.group(context_settings=HELP, short_help="Make and check datasets.")
def data() -> None:
    """Make datasets in COCO's layout, and check those of any layout."""


@data.command(context_settings=HELP, short_help="What a dataset holds, and what is wrong with it.")
@click.argument("folder", type=DATASET)
@click.option("--json", "json_path", type=OUTPUT_FILE, help="Write what was found as JSON.")
@click.option("--sheet", type=OUTPUT_FILE, help="Write a grid of pictures with their annotated boxes (.jpg).")
@click.option("--decode", is_flag=True, help="Read whole pictures, not their headers alone.")
@click.option("--stored-pixels", is_flag=True, help="Read pictures as stored, whatever their EXIF orientation says.")
def check(folder: Path, json_path: Path | None, sheet: Path | None, decode: bool, stored_pixels: bool) -> None:
    """Look through every split of the dataset in FOLDER, in COCO's layout or a labelling tool's.

    Ends with exit code 1 where something is wrong, such as boxes that do not count, pictures that are missing,
    unreadable or of another size, equal pictures, or splits of different categories.
    """
    from asag.runtime.dataset_check import check_dataset, write_annotated_sheet
    from asag.runtime.files import write_json
    from asag.runtime.records import to_json

    with progress_bar("looking at pictures") as advance:
        found = check_dataset(folder, stored_pixels, decode, advance)
    _print_check(found)
    if json_path is not None:
        write_json(json_path, {**to_json(found), "problems": found.problems})
        console.print(f"written: {json_path}", soft_wrap=True)
    if sheet is not None:
        write_annotated_sheet(sheet, folder, stored_pixels)
        console.print(f"written: {sheet}", soft_wrap=True)
    if found.problems:
        raise click.exceptions.Exit(1)


def _print_check(found: DatasetCheck) -> None:
    """Tables of the splits and of their classes, then what is wrong."""
    splits = Table(title=f"splits of {found.folder}")
    splits.add_column("split", overflow="fold")
    for column in ("images", "empty", "objects", "ignored", "small", "medium", "large", "tiny"):
        splits.add_column(column, justify="right")
    classes = Table(title="objects (images) of each class")
    classes.add_column("class")
    for one in found.splits:
        counts = (one.images, one.images_without_objects, one.objects, one.ignored, one.small, one.medium, one.large)
        splits.add_row(one.name, *map(str, counts), str(one.tiny))
        classes.add_column(one.name, justify="right")
    for name in dict.fromkeys(name for one in found.splits for name in one.objects_of_class):
        cells = [
            f"{one.objects_of_class[name]} ({one.images_of_class[name]})" if name in one.objects_of_class else "-"
            for one in found.splits
        ]
        classes.add_row(escape(name), *cells)
    console.print(splits)
    _say(
        "empty: images without objects; small, medium: under 32 x 32, 96 x 96 pixels; tiny: a side under 8 of 800/1333"
    )
    console.print(classes)
    for one in found.splits:
        for reason, count in one.left_out.items() if not one.mistakes else ():
            _say(f"{one.name}: left out {count} {reason}")
    _say(f"{found.compared} pictures compared by content")
    for line in found.problems:
        _say(f"wrong: {line}")
    if not found.problems:
        _say("nothing is wrong")


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


@data.command(context_settings=HELP, short_help="Coloured shapes on textured backgrounds.")
@click.argument("output", type=FOLDER)
@click.option("--train-images", type=click.IntRange(1), default=1600, show_default=True, help="Images to train on.")
@click.option("--val-images", type=click.IntRange(1), default=100, show_default=True, help="Images to evaluate on.")
@click.option(
    "--image-size", type=click.IntRange(64, 4096), default=320, show_default=True, help="Longer side, pixels."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="The same seed gives the same files."
)
def synthetic(output: Path, train_images: int, val_images: int, image_size: int, seed: int) -> None:
    """Write a dataset of coloured shapes to OUTPUT.

    Six classes, 3 to 12 objects per image, half of them 12 to 40 pixels long, so that the detector has to look closer.
    """
    from asag.train.synthetic import write_synthetic_dataset

    with progress_bar("painting") as advance:
        write_synthetic_dataset(
            output, train_images=train_images, val_images=val_images, image_size=image_size, seed=seed, progress=advance
        )
    console.print(f"dataset: {output}")


@data.command(context_settings=HELP, short_help="CrowdHuman's annotations to COCO's layout.")
@click.argument("annotations", type=EXISTING_FILE, nargs=-1, required=True, metavar="ODGT...")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of the dataset to write.")
@click.option("--images", type=FOLDER, help="Folder of the images.  [default: Images/ beside the annotations]")
def crowdhuman(annotations: tuple[Path, ...], output: Path, images: Path | None) -> None:
    """Convert CrowdHuman's annotation files, annotation_train.odgt and annotation_val.odgt, for `asag train --data`.

    The boxes are those of whole persons; regions to ignore are marked so. The images are linked, not copied.
    """
    from asag.train.crowdhuman import convert_crowdhuman

    with progress_bar("converting") as advance:
        converted = convert_crowdhuman(annotations, output, images, progress=advance)
    for split in converted:
        console.print(
            f"{split.annotations}: {split.images} images, {split.persons} persons, {split.ignored} regions to ignore",
            soft_wrap=True,
            highlight=False,
        )
