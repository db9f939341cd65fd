"""`asag detect`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from asag.cli.console import (
    EXISTING_FILE,
    FOLDER,
    HELP,
    choice_options,
    console,
    device_option,
    progress_bar,
    threads_option,
)


@click.command(context_settings=HELP, short_help="Detect objects in images and videos.")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", type=EXISTING_FILE, required=True, help="An .onnx, .engine or .safetensors file.")
@click.option(
    "-o", "--output", type=FOLDER, default=Path("detections"), show_default=True, help="Folder for the results."
)
@click.option(
    "--score-threshold", type=click.FloatRange(0, 1), default=0.3, show_default=True, help="Least score that is kept."
)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Images that run together.")
@click.option("--annotations", type=EXISTING_FILE, help="COCO file whose image ids the detections get, by file name.")
@click.option("--stages", is_flag=True, help="Draw how the detections came about; not for engines.")
@click.option("--ray", is_flag=True, help="Spread the images over Ray workers and write Parquet.")
@click.option(
    "--workers", type=click.IntRange(1), help="With --ray: sessions; as many as there is room for by default."
)
@click.option("--ray-address", help="With --ray: a running cluster, or auto; Ray is started here by default.")
@click.option("--image-column", help="With --ray and Parquet: the column of encoded images; image by default.")
@click.option("--id-column", help="With --ray and Parquet: what tells rows apart; the images' path by default.")
@choice_options
@device_option
@threads_option
def detect(
    images: tuple[Path, ...],
    model: Path,
    output: Path,
    score_threshold: float,
    batch_size: int,
    annotations: Path | None,
    stages: bool,
    ray: bool,
    workers: int | None,
    ray_address: str | None,
    image_column: str | None,
    id_column: str | None,
    choices: dict[str, Any],
    device: str,
    threads: int | None,
) -> None:
    """Detect objects in IMAGES (files, folders with all that is below them, videos).

    Writes detections.json (a list in COCO's results format, boxes as x, y, width, height in pixels), images.json (which
    images these are) and each image or frame with its detections drawn. Without --annotations image ids count from 1.
    What cannot be read is reported and does not stop the rest; the exit code is then 2. An interrupted run writes what
    it has done.

    With --stages a picture shows how they came about, side by side (NAME-stages.jpg): what the model looked at more
    closely in red, boxes without a class in white, what has a class in its colour, and where the best detections
    look as dots, a colour each.

    With --ray IMAGES are files, folders with all that is below them, or Parquet files with encoded images; the output
    is a folder of Parquet files with a row for each image, and no pictures. Each worker has one session, with one
    thread unless --threads says more, or with one GPU for --device cuda and engines. A killed worker is started again
    and loses nothing.
    """
    if ray:
        if stages or annotations:
            raise click.UsageError("--ray writes neither pictures for --stages nor the ids of --annotations")
        _detect_with_ray(
            images,
            output,
            workers,
            ray_address,
            model=model,
            device=device,
            threads=threads or 1,
            choices=choices,
            batch_size=batch_size,
            score_threshold=score_threshold,
            image_column=image_column or "image",
            id_column=id_column,
        )
        return
    for option, value in (
        ("--workers", workers),
        ("--ray-address", ray_address),
        ("--image-column", image_column),
        ("--id-column", id_column),
    ):
        if value is not None:
            raise click.UsageError(f"{option} needs --ray")

    _check_named(images)
    from asag.runtime.coco_dataset import CocoFolder
    from asag.runtime.detect import detect_files
    from asag.runtime.image_source import is_video
    from asag.runtime.opening import open_session

    # Two batches beside one another do more in a second; a single image is done sooner by all threads together.
    single = len(images) == 1 and not images[0].is_dir() and not is_video(images[0])
    contexts = 1 if single or stages else 2
    folder = None if annotations is None else CocoFolder(annotations.parent, annotations)
    with open_session(model, device=device, threads=threads, choices=choices, contexts=contexts) as session:
        if stages:
            session.check_stages()
        with progress_bar("detecting") as advance:
            summary = detect_files(
                session,
                images,
                output,
                score_threshold=score_threshold,
                batch_size=batch_size,
                progress=advance,
                stages=stages,
                annotations=folder,
            )
    console.print(f"{summary.detections} detections in {summary.images} images: {summary.json_path}", highlight=False)
    for path, reason in summary.errors:
        click.echo(f"asag: {path}: {reason}" if str(path) not in reason else f"asag: {reason}", err=True)
    if summary.errors:
        raise SystemExit(2)


def _check_named(images: tuple[Path, ...]) -> None:
    """Say what is not supported before anything runs."""
    for image in images:
        address = re.match(r"[a-z][a-z0-9+.-]+:/", str(image))
        if address and not image.exists():
            written = str(image).replace(":/", "://", 1)  # a path loses one of the slashes
            raise click.UsageError(
                f"{written} is an address: download it first, detect reads files, folders and videos"
            )
        if str(image).isdecimal() and not image.exists():
            raise click.UsageError(f"{image} is no file, and cameras are not read: record a video first")


def _detect_with_ray(
    images: tuple[Path, ...], output: Path, workers: int | None, ray_address: str | None, **options: Any
) -> None:
    from asag.runtime.scale_out.detection import detect_with_ray
    from asag.runtime.scale_out.worker import WorkerOptions

    with progress_bar("detecting") as advance:
        summary = detect_with_ray(
            WorkerOptions(**options), images, output, workers=workers, ray_address=ray_address, progress=advance
        )
    console.print(f"{summary.detections} detections in {summary.images} images: {summary.output}", highlight=False)
    if summary.errors:
        click.echo(
            f"asag: {summary.errors} images could not be read: see the column error in {summary.output}", err=True
        )
        raise SystemExit(2)
