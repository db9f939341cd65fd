"""`asag zoo`."""

from __future__ import annotations

import click

from asag_cli.console import console


@click.group(invoke_without_command=True, short_help="The presets and their published accuracy.")
@click.pass_context
def zoo(context: click.Context) -> None:
    """List the presets: what they are made of and what the paper reports for them."""
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from asag.presets import PRESETS

    table = Table(title="Presets")
    for name in ("preset", "decoder", "backbone", "epochs", "queries", "head", "published (COCO val, or CrowdHuman)"):
        table.add_column(name, overflow="fold")
    for name, preset in PRESETS.items():
        config = preset.config
        queries = "-" if preset.published_queries is None else f"{preset.published_queries} on average"
        epochs = "-" if preset.epochs is None else str(preset.epochs)
        table.add_row(name, config.decoder, config.backbone, epochs, queries, config.head, preset.published or "none: for demos")
    console.print(table)
