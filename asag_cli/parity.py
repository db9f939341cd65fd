"""`asag parity`."""

from __future__ import annotations

from pathlib import Path

import click

from asag_cli.console import EXISTING_FILE, FOLDER, OUTPUT_FILE, console, device_option, progress_bar, threads_option


@click.command(short_help="Does a model give the detections of its reference?")
@click.argument("reference", type=EXISTING_FILE)
@click.argument("candidates", nargs=-1, required=True, type=EXISTING_FILE)
@click.option("--data", type=FOLDER, required=True, help="Dataset in COCO's layout, of the models' classes.")
@click.option("--split", default="val2017", show_default=True, help="Which images of the dataset.")
@click.option("--images", type=click.IntRange(1), help="Only the first images of the split.")
@click.option("--report", type=OUTPUT_FILE, help="Also write an HTML page with the detections drawn.")
@click.option("--json", "json_path", type=OUTPUT_FILE, help="Also write the numbers to this file.")
@click.option("--check", is_flag=True, help="Exit with code 1 when a candidate did not run or an image does not agree.")
@device_option
@threads_option
def parity(
    reference: Path,
    candidates: tuple[Path, ...],
    data: Path,
    split: str,
    images: int | None,
    report: Path | None,
    json_path: Path | None,
    check: bool,
    device: str,
    threads: int | None,
) -> None:
    """Run REFERENCE and CANDIDATES on the same images and compare AP, detections and latency.

    Detections of an image are matched one to one; scores may differ by 1e-4 and boxes by 0.05 pixels. Ties (equal
    scores in another order, or at the cut of 100 detections) are counted apart. A candidate that cannot run here is a
    row that says why. A checkpoint as the reference is run with the input size, head, levels and patch capacity of the
    first candidate.
    """
    from runtime.coco_evaluation import open_coco
    from runtime.files import write_json
    from runtime.parity import compare, open_candidate, open_reference, parity_table
    from runtime.report import write_report

    dataset = open_coco(data, split)
    others = [open_candidate(path, device=device, threads=threads) for path in candidates]
    first = open_reference(reference, others, device=device, threads=threads)
    with progress_bar("comparing") as advance:
        result = compare(first, others, dataset, images=images, progress=advance)
    console.print(parity_table(result))
    if json_path is not None:
        write_json(json_path, result.to_json())
    if report is not None:
        console.print(f"report: {write_report(report, result, dataset, reference=first)}")
    if check and not (result.agrees and all(row.reason is None for row in result.rows)):
        raise SystemExit(1)
