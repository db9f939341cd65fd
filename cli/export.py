"""`asag export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from asag.cli.console import EXISTING_FILE, HELP, OUTPUT_FILE, SizeType, check_ending, choice_options, console


@click.command(context_settings=HELP, short_help="Write a checkpoint as one ONNX file.")
@click.argument("checkpoint", type=EXISTING_FILE)
@click.option("-o", "--output", type=OUTPUT_FILE, required=True, help="The .onnx file to write.")
@click.option(
    "--input-size", type=SizeType(), help="Height and width of the input, multiples of 32; the checkpoint's by default."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Type of backbone, neck and large linear layers; boxes, thresholds, norms and softmax stay float32. bf16 is"
    " for engines: ONNX Runtime does not run it on a CPU. int8 is made by `asag quantize`.",
)
@click.option(
    "--input-type",
    type=click.Choice(["uint8", "float32"]),
    default="uint8",
    show_default=True,
    help="uint8 takes RGB pixels and normalizes inside; float32 takes normalized RGB.",
)
@choice_options
def export(
    checkpoint: Path,
    output: Path,
    input_size: tuple[int, int] | None,
    input_type: str,
    precision: str,
    choices: dict[str, Any],
) -> None:
    """Write CHECKPOINT (.safetensors) as one ONNX file with dynamic batch.

    \b
    Inputs:   images  [batch, 3, height, width]  RGB, content top-left, zeros around it
              sizes   [batch, 2] float32         height and width of the content
    Outputs:  boxes   [batch, detections, 4]     x1, y1, x2, y2 as fractions of the content
              scores  [batch, detections]        falling; 0 where there is no detection
              labels  [batch, detections] int64  category ids of the dataset
              overflow [batch] int32             what a fixed capacity had no room for

    Ops that no standard operator expresses well are nodes of the domain `asag` with bodies of standard operators in the
    file: any ONNX runtime can execute them, and one that knows them may use its own kernels. Classes, normalization,
    input size, the stages' names and a digest of the weights travel in the file's metadata.
    """
    check_ending(output, ".onnx")
    if not checkpoint.is_file():  # before PyTorch, which takes seconds to load, finds it out
        raise FileNotFoundError(f"{checkpoint}: no such checkpoint")
    from asag.checkpoint import load_detector
    from asag.deploy import DeployedDetector
    from asag.export.model import export_onnx

    with console.status("loading"):
        model = DeployedDetector(*load_detector(checkpoint, choices), input_size, input_type)
    with console.status("exporting"):
        report = export_onnx(model, output, precision)
    operations = ", ".join(f"{count} {name}" for name, count in report.operations.items())
    of_them = f", of them {operations}" if operations else ""
    console.print(f"{report.path}: {report.bytes / 1e6:.1f} MB, {report.nodes} nodes{of_them}", highlight=False)
    chosen = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.metadata.choices.items())
    left_out = f"left out: {report.parameters_left_out / 1e6:.1f} million parameters of training and folded norms"
    console.print(f"{chosen}; {left_out}" if chosen else left_out, highlight=False)
