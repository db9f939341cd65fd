"""`asag inspect`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from asag.cli.console import EXISTING_FILE, HELP, OUTPUT_FILE, console

if TYPE_CHECKING:
    from asag.runtime.inspection import Inspection


@click.command(context_settings=HELP, short_help="Show what a model file holds.")
@click.argument("model", type=EXISTING_FILE)
@click.option("--json", "json_path", type=OUTPUT_FILE, help="File for the tables as JSON.")
def inspect(model: Path, json_path: Path | None) -> None:
    """Show what MODEL (.onnx, .engine or .safetensors) holds, without running it.

    A checkpoint: its configuration, classes and parameters. An exported file: operators, functions, element types and
    sizes, and of another tool's what `asag adopt` would make of it. An engine: what it was built from and for, its
    profiles and the network's layers; where a GPU can open it, also the layers after fusion and their memory.
    """
    from asag.runtime.files import write_json
    from asag.runtime.inspection import inspect_file

    found = _with_outlook(inspect_file(model))
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
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if json_path is not None:
        write_json(json_path, found.to_json())


def _with_outlook(found: Inspection) -> Inspection:
    """The tables, with one more for an .onnx file that is none of ours."""
    ours = any(section.title == "model" for section in found.sections)
    if found.path.suffix.lower() != ".onnx" or ours:
        return found
    from asag.export.adoption.outlook import outlook
    from asag.runtime.inspection import Section

    try:
        facts, command = outlook(found.path)
    except ValueError as error:
        return dataclasses.replace(found, notes=(*found.notes, str(error)))
    section = Section("as a foreign detector", ("name", "value"), tuple(facts.items()))
    notes = found.notes if command is None else (*found.notes, f"adopt it: {command}")
    return dataclasses.replace(found, sections=(section, *found.sections), notes=notes)
