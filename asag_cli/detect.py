"""`asag detect`."""

from __future__ import annotations

from pathlib import Path

import click

from asag_cli.console import (
    EXISTING_FILE,
    FOLDER,
    HELP,
    console,
    device_option,
    progress_bar,
    threads_option,
    variant_options,
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
@click.option("--stages", is_flag=True, help="Draw how the detections came about; needs a .safetensors model.")
@variant_options
@device_option
@threads_option
def detect(
    images: tuple[Path, ...],
    model: Path,
    output: Path,
    score_threshold: float,
    batch_size: int,
    stages: bool,
    head: str | None,
    levels: str | None,
    device: str,
    threads: int | None,
) -> None:
    """Detect objects in IMAGES (files, folders of images, videos).

    Writes detections.json (COCO's results format, boxes as x, y, width, height in pixels) and each image or frame with
    its detections drawn. What cannot be read is reported and does not stop the rest; the exit code is then 2. The next
    batch is read while one runs.

    With --stages a picture shows how they came about, side by side (NAME-stages.jpg): the patches that were explored in
    red, the sparse anchors in white, dynamic proposals and final boxes coloured by class.
    """
    from runtime.detect import detect_files
    from runtime.session import open_session

    with open_session(model, device=device, threads=threads, head=head, levels=levels) as session:
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
            )
    console.print(f"{summary.detections} detections in {summary.images} images: {summary.json_path}", highlight=False)
    for path, reason in summary.errors:
        click.echo(f"asag: {path}: {reason}" if str(path) not in reason else f"asag: {reason}", err=True)
    if summary.errors:
        raise SystemExit(2)
