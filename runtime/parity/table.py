"""A parity run as tables for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from asag.runtime.parity.bootstrap import Interval
from asag.runtime.parity.results import AP_NAMES, ParityReport, ParityRow
from asag.runtime.speed.table import milliseconds

HEADINGS = (
    "model",
    "backend",
    "precision",
    "AP",
    "AP difference",
    "largest score difference",
    "largest box difference, px",
    "unmatched",
    "ties",
    "p50 ms",
    "p95 ms",
)
_SHORT_HEADINGS = (
    "backend",
    "prec.",
    "AP",
    "AP\ndiff",
    "score\ndiff",
    "box\ndiff px",
    "un-\nmatched",
    "ties",
    "p50\nms",
    "p95\nms",
)

ACCURACY_HEADINGS = (
    "backend",
    "AP",
    "95 % over\nimages",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "found\nIoU .99\nIoU .9",
)


def parity_table(report: ParityReport) -> Group:
    """The report for a terminal of 80 columns: a table, and below it why a row was not run.

    Files are named only where backend and precision do not tell the rows apart.
    """
    name_rows = len({(row.backend, row.precision) for row in report.rows}) < len(report.rows)
    table = Table(
        title=f"Parity on {len(report.image_ids)} images of {Path(report.dataset).name}",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for index, heading in enumerate(_SHORT_HEADINGS):
        # Only names may wrap; a folded number is misread.
        table.add_column(heading, justify="left" if index < 2 else "right", no_wrap=index > 0, overflow="fold")
    notes = []
    for row in report.rows:
        name, backend, *cells = row_cells(row)
        table.add_row(*map(Text, [f"{backend}\n{name}" if name_rows else backend, *cells]))
        if row.reason is not None:
            notes.append(Text(f"{row.name} ({row.backend}) was not run: {row.reason}", style="yellow"))
    notes += _batch_notes(report)
    return Group(table, accuracy_table(report), *notes, Text(report.machine.summary(), style="dim"))


def accuracy_table(report: ParityReport) -> Table:
    """Every AP with its difference to the reference below it, and how many detections were found again.

    AP and its difference come with their 95 % intervals.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for index, heading in enumerate(ACCURACY_HEADINGS):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index > 0, overflow="fold")
    for row in report.rows:
        if row.result is not None:
            table.add_row(*map(Text, accuracy_cells(row)))
    return table


def accuracy_cells(row: ParityRow) -> list[str]:
    """The values of a row that ran, in the order of ``ACCURACY_HEADINGS``; a cell may have two lines."""
    assert row.result is not None
    backend = row.backend.replace("-", "-\n", 1)
    cells = [f"{backend} {row.precision}"]
    for name in AP_NAMES:
        lines = [f"{getattr(row.result, name):.3f}"]
        if row.differences is not None:
            lines.append(f"{row.differences[name]:{'+.4f' if name == 'ap' else '+.3f'}}")
        cells.append("\n".join(lines))
    cells.insert(2, f"{_range(row.ap_interval, '.3f')}\n{_range(row.ap_difference_interval, '+.3f')}".rstrip())
    if row.agreement is None:
        return [*cells, ""]
    return [*cells, f"{row.agreement.share_iou_99:.1%}\n{row.agreement.share_iou_90:.1%}"]


def _range(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f"{interval.low:{form}}..{interval.high:{form}}"


def _batch_notes(report: ParityReport) -> list[Text]:
    """What the checks of batches found; where nothing differs, one line."""
    checked = [check for check in report.batch_checks if check.reason is None]
    notable = [check for check in report.batch_checks if check.reason is not None or not check.agrees]
    notes = [Text(check.sentence(), style="yellow" if check.reason else "red") for check in notable]
    if checked and all(check.agrees for check in checked):
        sizes = ", ".join(str(size) for size in sorted({check.batch for check in checked}))
        notes.append(Text(f"Copies in a batch agree, and batches of {sizes} give the results of batch 1."))
    return notes


def row_cells(row: ParityRow) -> list[str]:
    """A row's values as text, in the order of ``HEADINGS``."""
    cells = [row.name, row.backend, row.precision]
    if row.result is None:
        return [*cells, "not run", *[""] * (len(HEADINGS) - 4)]
    agreement = row.agreement
    return [
        *cells,
        f"{row.result.ap:.3f}",
        "" if row.ap_difference is None else f"{row.ap_difference:+.4f}",
        "" if agreement is None else f"{agreement.score_difference:.1e}",
        "" if agreement is None else f"{agreement.box_difference:.1e}",
        "" if agreement is None else str(agreement.unmatched),
        "" if agreement is None else str(agreement.cut_ties + agreement.swaps),
        *("" if value is None else milliseconds(value) for value in (row.latency_p50_ms, row.latency_p95_ms)),
    ]
