"""`asag zoo`."""

from __future__ import annotations

from pathlib import Path

import click

from asag.cli.console import HELP, OUTPUT_FILE, check_ending, console


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

    from asag.families import FAMILIES, all_presets

    titles = ", ".join(f"{family.name}: {family.title}" for family in FAMILIES)
    table = Table(title=f"Families: {titles}", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("preset", "backbone", "epochs", "queries"):
        table.add_column(name, no_wrap=True, justify="right" if name in ("epochs", "queries") else "left")
    table.add_column("published")
    for preset in all_presets():
        published, epochs = preset.published, str(preset.recipe.get("epochs", "-"))
        told = ("-", "no: for demos") if published is None else (published.queries or "-", published.accuracy)
        table.add_row(preset.name, preset.config.backbone, epochs, *told)
    console.print(table)


@zoo.command(context_settings=HELP, short_help="Turn a published checkpoint into ours.")
@click.argument("published", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=OUTPUT_FILE, required=True, help="The .safetensors file to write.")
@click.option(
    "--preset", help="Which preset it is, where several have the same tensors; decides what is deployed of it."
)
def convert(published: Path, output: Path, preset: str | None) -> None:
    """Turn PUBLISHED into a checkpoint for every other command.

    PUBLISHED is a .pth or .safetensors file as the authors distribute it, or a Hugging Face folder (config.json and
    model.safetensors). The family, its configuration and classes are read off the tensors. The file is loaded without
    executing anything in it; optimizer state and arguments are left behind.
    """
    check_ending(output, ".safetensors")
    from asag.published import convert_published

    found = convert_published(published, output, preset)
    console.print(f"{output}: {found.preset}", highlight=False)
    if preset is None and len(found.alternatives) > 1:
        others = ", ".join(other for other in found.alternatives if other != found.preset)
        console.print(f"the tensors also fit {others}: name yours with --preset", style="yellow", highlight=False)
    for name, (told, value) in found.overruled.items():
        line = f"{name.replace('_', ' ')} is {value} as in {preset}; the file by itself is read as {told}"
        console.print(line, style="yellow", highlight=False)
