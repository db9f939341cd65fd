"""`asag adopt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from asag.cli.console import EXISTING_FILE, FOLDER, HELP, OUTPUT_FILE, SizeType, check_ending, console

LAYOUTS = ("rtdetr", "dfineseg", "transformers", "rfdetr", "mmdeploy", "ultralytics", "ultralytics6")


class TripleType(click.ParamType):
    """Three numbers with commas between them."""

    name = "R,G,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parse the text; a tuple is taken as it is."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != 3:
            self.fail(f"{value!r} is not three numbers; write them like 0.485,0.456,0.406", param, ctx)
        return numbers


@click.command(context_settings=HELP, short_help="Make another tool's ONNX detector one of ours.")
@click.argument("foreign", type=EXISTING_FILE)
@click.option("-o", "--output", type=OUTPUT_FILE, required=True, help="The .onnx file to write.")
@click.option("--layout", type=click.Choice(LAYOUTS), help="What its inputs and outputs are; told by their names.")
@click.option("--input-size", type=SizeType(), help="Height and width, where the file leaves them open.")
@click.option("--resize", type=click.Choice(["stretch", "fit"]), help="To the whole input, or keeping the aspect.")
@click.option(
    "--interpolation",
    type=click.Choice(["antialias", "bilinear"]),
    help="PIL's bilinear filter, or two taps per axis, as arrays are resized elsewhere.",
)
@click.option(
    "--normalization",
    type=click.Choice(["unit", "imagenet"]),
    help="Pixels/255, or then ImageNet's mean and deviation.",
)
@click.option("--mean", type=TripleType(), help="Mean of pixels in 0..1; with --std.")
@click.option("--std", type=TripleType(), help="Standard deviation of pixels in 0..1; with --mean.")
@click.option("--bgr", is_flag=True, help="The file wants blue first.")
@click.option(
    "--activation", type=click.Choice(["sigmoid", "softmax"]), help="Of logits; softmax: the last class means none."
)
@click.option("--classes", metavar="FILE|coco80|coco91", help="COCO annotations, or a name per line.")
@click.option("--images", type=FOLDER, help="Photographs to verify with; else pictures are made up.")
@click.option("--keep-grid-sample", is_flag=True, help="Replace nothing: the reference for `asag parity`.")
@click.option("--strict", is_flag=True, help="Refuse a file with a GridSample that has no replacement.")
def adopt(foreign: Path, output: Path, **options: Any) -> None:
    """Write FOREIGN (.onnx), a detector of RT-DETR's kin that another tool exported, as a file of `asag export`.

    Every other command then works on it. Deformable attention is recognised by running the file and becomes the op
    MultiScaleDeformableAttention; any other bilinear GridSample, which TensorRT miscompiles, becomes SampleGrid. Both
    have bodies of standard operators in the file, and CUDA kernels.

    What the file does not say is assumed and printed. In the end both files are run on the same pictures; nothing is
    written when a detection above 0.05 has no partner.
    """
    check_ending(output, ".onnx")
    from asag.export.adoption.adopt import adopt as adopt_file
    from asag.export.adoption.plan import AdoptionOptions

    with console.status("reading") as status:
        report = adopt_file(foreign, output, AdoptionOptions(**options), status.update)
    for line in report.assumed:
        console.print(f"assumed: {line}", highlight=False, soft_wrap=True, markup=False)
    for line in report.warnings:
        console.print(f"warning: {line}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    console.print(report.summary(), highlight=False, soft_wrap=True, markup=False)
