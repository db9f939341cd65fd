"""`asag parity`."""

from __future__ import annotations

from pathlib import Path

import click

from asag.cli.console import (
    EXISTING_FILE,
    HELP,
    OUTPUT_FILE,
    DatasetChoice,
    console,
    dataset_options,
    device_option,
    progress_bar,
    threads_option,
)


@click.command(context_settings=HELP, short_help="Does a model give the detections of its reference?")
@click.argument("reference", type=EXISTING_FILE)
@click.argument("candidates", nargs=-1, required=True, type=EXISTING_FILE)
@dataset_options()
@click.option("--report", type=OUTPUT_FILE, help="Also write an HTML page with the detections drawn.")
@click.option("--json", "json_path", type=OUTPUT_FILE, help="Also write all of it to this file, for `asag report`.")
@click.option(
    "--batch-check/--no-batch-check",
    default=True,
    show_default=True,
    help="Also check that no result depends on the rest of its batch.",
)
@click.option(
    "--stages/--no-stages",
    default=True,
    show_default=True,
    help="Also compare exported files with a checkpoint stage by stage, to see where differences start.",
)
@click.option("--check", is_flag=True, help="Exit with code 1 when a candidate did not run or anything does not agree.")
@click.option("--max-ap-drop", type=float, help="Budget: AP that a candidate may lose, such as 0.002.")
@click.option("--max-score-difference", type=float, help="Budget: largest difference of a score.")
@click.option("--max-box-difference", type=float, help="Budget: largest difference of a box, pixels.")
@click.option("--max-unmatched", type=click.IntRange(0), help="Budget: detections without a partner.")
@click.option("--min-agreement", type=float, help="Budget: least share of detections found again with IoU 0.9.")
@click.option("--max-latency-ratio", type=float, help="Budget: median latency over the reference's.")
@device_option
@threads_option
def parity(
    reference: Path,
    candidates: tuple[Path, ...],
    dataset: DatasetChoice,
    report: Path | None,
    json_path: Path | None,
    batch_check: bool,
    stages: bool,
    check: bool,
    max_ap_drop: float | None,
    max_score_difference: float | None,
    max_box_difference: float | None,
    max_unmatched: int | None,
    min_agreement: float | None,
    max_latency_ratio: float | None,
    device: str,
    threads: int | None,
) -> None:
    """Run REFERENCE and CANDIDATES on the same images and compare AP, detections and latency.

    Detections of an image are matched one to one; scores may differ by 1e-4 and boxes by 0.05 pixels. Ties (equal
    scores in another order, or where the best detections are cut off) are counted apart. A candidate that cannot run
    here is a row that says why. A checkpoint as the reference is run with the input size and the choices of the first
    candidate.

    Every model is also checked alone: copies of an image in one batch must give one result, and batches of 2 and 4 (as
    far as the model takes them) the results of batch 1.

    When something differs, and for --check, --json and --report, exported files are compared with a checkpoint stage by
    stage, as its family names them, on the images that differ most.

    With --check, or with a budget (--max-..., --min-...), the command exits with code 1 when something is over it.
    """
    from asag.runtime.files import write_json
    from asag.runtime.parity.batch_checks import BATCH_SIZES
    from asag.runtime.parity.budgets import Budgets, over_budget
    from asag.runtime.parity.comparison import add_stages, compare, open_candidate, open_reference, parity_table
    from asag.runtime.parity.stage_comparison import stage_table
    from asag.runtime.reports.document import make_document
    from asag.runtime.reports.page import write_page

    folder = dataset.open()
    others = [open_candidate(path, device=device, threads=threads) for path in candidates]
    first = open_reference(reference, others, device=device, threads=threads)
    sizes = BATCH_SIZES if batch_check else ()
    with progress_bar("comparing") as advance:
        result = compare(
            first, others, folder, dataset.images, progress=advance, batch_sizes=sizes, classes=dataset.classes
        )
    if stages and (not result.agrees or check or json_path or report):
        with progress_bar("stages") as advance:
            result = add_stages(result, first, others, folder, progress=advance)
    console.print(parity_table(result))
    for stage_report in result.stages:
        console.print(stage_table(stage_report))
    if json_path is not None or report is not None:
        document = make_document(result, folder, reference=first, candidates=others)
        if json_path is not None:
            write_json(json_path, document.to_json())
        if report is not None:
            console.print(f"report: {write_page(report, [document])}", soft_wrap=True, highlight=False)
    budgets = Budgets(
        max_ap_drop, max_score_difference, max_box_difference, max_unmatched, min_agreement, max_latency_ratio
    )
    broken = over_budget(result, budgets)
    for line in broken:
        console.print(f"over budget: {line}", style="red", highlight=False, soft_wrap=True)
    agrees = result.agrees and result.batches_agree and all(row.reason is None for row in result.rows)
    if broken or (check and not agrees) or (budgets.any and not result.batches_agree):
        raise SystemExit(1)
