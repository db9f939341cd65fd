"""`asag report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from asag.cli.console import HELP, OUTPUT_FILE, console

if TYPE_CHECKING:
    from asag.runtime.reports.charts import Level


@click.command(context_settings=HELP, short_help="One HTML page of parity runs and benchmarks.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=OUTPUT_FILE, help="The page; report.html beside the first run by default.")
@click.option("--title", default="Parity report", show_default=True, help="Its heading.")
def report(runs: tuple[Path, ...], output: Path | None, title: str) -> None:
    """Show RUNS together: files that `asag parity --json` and `asag bench --json` wrote, or folders of them.

    The page holds tables, AP over latency of all models, latency by stage, score differences, where differences start,
    and the pictures of the parity runs. It is one file and needs no network.
    """
    from asag.runtime.reports.page import find_reports, write_page

    documents, benchmarks = find_reports(runs)
    first = runs[0] if runs[0].is_dir() else runs[0].parent
    page = write_page(output or first / "report.html", documents, benchmarks, title=title, published=published_levels())
    console.print(f"report: {page}", soft_wrap=True, highlight=False)


def published_levels() -> list[Level]:
    """The published AP on COCO of every preset that has one, on the scale of 0 to 1."""
    from asag.families import all_presets
    from asag.runtime.reports.charts import Level

    return [
        Level(preset.name, preset.published.ap / 100)
        for preset in all_presets()
        if preset.published is not None and preset.published.ap is not None
    ]
