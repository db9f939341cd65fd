"""`asag inspect`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from asag.cli.console import EXISTING_FILE, HELP, OUTPUT_FILE, console


@click.command(context_settings=HELP, short_help="Show what a model file holds.")
@click.argument("model", type=EXISTING_FILE)
@click.option("--json", "json_path", type=OUTPUT_FILE, help="File for the tables as JSON.")
def inspect(model: Path, json_path: Path | None) -> None:
    """Show what MODEL (.onnx, .engine or .safetensors) holds, without running it.

    A checkpoint: its configuration, classes and parameters. An exported file: operators, functions, element types and
    sizes. An engine: what it was built from and for, its profiles and the network's layers; where a GPU can open it,
    also the layers after fusion and their memory.
    """
    from asag.runtime.files import write_json
    from asag.runtime.inspection import inspect_file

    found = inspect_file(model)
    for section in found.sections:
        table = Table(box=None, pad_edge=False)
        for number, column in enumerate(section.columns):
            numeric = all(isinstance(row[number], int | float) for row in section.rows)
            table.add_column(column, justify="right" if numeric and section.rows else "left", overflow="fold")
        for row in section.rows:
            table.add_row(*(Text(f"{value:,}" if type(value) is int else str(value)) for value in row))
        console.print(section.title, style="bold", highlight=False)
        console.print(table)
        console.print()
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    if json_path is not None:
        write_json(json_path, found.to_json())
