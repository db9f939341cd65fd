"""`asag quantize`."""

from __future__ import annotations

from pathlib import Path

import click

from asag.cli.console import (
    EXISTING_FILE,
    FOLDER,
    HELP,
    OUTPUT_FILE,
    DatasetChoice,
    check_ending,
    console,
    dataset_options,
    phase_bars,
)


@click.command(context_settings=HELP, short_help="Make an exported file int8.")
@click.argument("model", type=EXISTING_FILE)
@click.option("-o", "--output", type=OUTPUT_FILE, required=True, help="The .onnx file to write.")
@click.option("--calibration", type=FOLDER, required=True, help="Images like those the model will see.")
@click.option(
    "--calibration-images",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="At most so many of them, taken evenly by name.",
)
@dataset_options(required=False)
@click.option(
    "--max-ap-drop",
    type=click.FloatRange(0, 1),
    help="AP that int8 may cost, such as 0.005; the layers that cost most go back to fp16 until it holds.",
)
def quantize(
    model: Path,
    output: Path,
    calibration: Path,
    calibration_images: int,
    dataset: DatasetChoice,
    max_ap_drop: float | None,
) -> None:
    """Write MODEL, a float32 file of `asag export`, with the convolutions of backbone and neck in int8.

    Weights are int8 per output channel, activations per tensor, both symmetric, as TensorRT executes them. Large linear
    layers and what lies between the convolutions are fp16; boxes, thresholds, norms and softmax stay float32.

    With --data, AP is measured on ONNX Runtime before and after. With --max-ap-drop as well, layers go back to fp16
    until the drop is within it, those first whose quantization alone changes the scores most; each is listed. When AP
    falls further with no layer in int8, nothing is written and the exit code is 2. Without --data the accuracy is
    unknown until `asag parity`.
    """
    check_ending(output, ".onnx")
    if dataset.folder is None and max_ap_drop is not None:
        raise click.UsageError("--max-ap-drop needs --data to measure it on")
    from asag.export.quantization import quantize_int8
    from asag.runtime.image_source import images_in

    if not calibration.is_dir():
        raise FileNotFoundError(f"no calibration images: {calibration} is not a folder")
    folder = None if dataset.folder is None else dataset.open()
    found = images_in(calibration)
    count = min(calibration_images, len(found))
    with phase_bars() as progress:
        report = quantize_int8(
            model,
            output,
            [found[number * len(found) // count] for number in range(count)],
            dataset=folder,
            max_ap_drop=max_ap_drop,
            progress=progress,
            evaluation_images=dataset.images,
            classes=dataset.classes,
        )
    for line in report.summary():
        console.print(line, soft_wrap=True, highlight=False)
