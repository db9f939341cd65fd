"""`asag data`."""

from __future__ import annotations

from pathlib import Path

import click

from asag_cli.console import EXISTING_FILE, FOLDER, HELP, console, progress_bar


@click.group(context_settings=HELP, short_help="Make datasets.")
def data() -> None:
    """Make datasets in COCO's layout."""


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
    from train.synthetic import write_synthetic_dataset

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
    from train.crowdhuman import convert_crowdhuman

    with progress_bar("converting") as advance:
        converted = convert_crowdhuman(annotations, output, images, progress=advance)
    for split in converted:
        console.print(
            f"{split.annotations}: {split.images} images, {split.persons} persons, {split.ignored} regions to ignore",
            soft_wrap=True,
            highlight=False,
        )
