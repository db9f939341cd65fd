"""`asag zoo`."""

from __future__ import annotations

from pathlib import Path

import click

from asag_cli.console import EXISTING_FILE, HELP, OUTPUT_FILE, console


@click.group(context_settings=HELP, invoke_without_command=True, short_help="The presets and their published accuracy.")
@click.pass_context
def zoo(context: click.Context) -> None:
    """List the presets: what they are made of and what the paper reports for them.

    Published accuracy is box AP on COCO val2017, or AP, mMR and recall on CrowdHuman, as the paper gives it; queries
    are the paper's average number per image.
    """
    if context.invoked_subcommand is not None:
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from asag.presets import PRESETS

    table = Table(
        title="asag-a: AdaMixer head, asag-s: Sparse R-CNN head", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    for name in ("preset", "backbone", "epochs", "queries", "head"):
        table.add_column(name, no_wrap=True, justify="right" if name in ("epochs", "queries") else "left")
    table.add_column("published")
    for name, preset in PRESETS.items():
        config = preset.config
        epochs = "-" if preset.epochs is None else str(preset.epochs)
        published = preset.published or "no: for demos"
        table.add_row(name, config.backbone, epochs, preset.published_queries or "-", config.head, published)
    console.print(table)


@zoo.command(context_settings=HELP, short_help="Turn a published checkpoint into ours.")
@click.argument("published", type=EXISTING_FILE)
@click.option("-o", "--output", type=OUTPUT_FILE, required=True, help="The .safetensors file to write.")
@click.option(
    "--preset", help="Which preset it is, where several have the same tensors; decides the head that is deployed."
)
def convert(published: Path, output: Path, preset: str | None) -> None:
    """Turn PUBLISHED (.pth, as the authors distribute it) into a checkpoint for every other command.

    Decoder, backbone, queries and classes are read off the tensors. The file is loaded without executing anything in
    it; optimizer state and arguments are left behind.
    """
    from asag.zoo import convert_published

    name, info = convert_published(published, output, preset)
    head = info.config.head
    console.print(f"{output}: {name}, head {head}", highlight=False)
    if preset is None and len(info.alternatives) > 1:
        others = ", ".join(other for other in info.alternatives if other != name)
        console.print(f"the tensors also fit {others}: name yours with --preset", style="yellow", highlight=False)
