"""`asag build`."""

from __future__ import annotations

from pathlib import Path

import click

from asag_cli.console import EXISTING_FILE, OUTPUT_FILE, IntegersType, console


@click.command(short_help="Build a TensorRT engine from an exported file.")
@click.argument("model", type=EXISTING_FILE)
@click.option("-o", "--output", type=OUTPUT_FILE, required=True, help="The .engine file to write.")
@click.option(
    "--backend",
    type=click.Choice(["tensorrt-rtx"]),
    default="tensorrt-rtx",
    show_default=True,
    help="TensorRT for RTX: its builder needs no GPU; the engine runs on compute capability 7.5, 8.x and 12.x.",
)
@click.option(
    "--batch",
    type=IntegersType(3, ":", "SMALLEST:PREFERRED:LARGEST"),
    default="1:1:4",
    show_default=True,
    help="Batch sizes the engine takes, and the one it is tuned for.",
)
def build(model: Path, output: Path, backend: str, batch: tuple[int, int, int]) -> None:
    """Build an engine from MODEL (.onnx).

    Works on a machine without a GPU. The bodies of the `asag` ops are inlined first. Beside the engine a manifest
    (OUTPUT.json) records the digest of the ONNX file, versions, precision and batch sizes.
    """
    from runtime.tensorrt_rtx import build_engine

    with console.status("building") as status:
        result = build_engine(
            model, output, batch, progress=lambda phase, done: status.update(f"building: {phase} {done:.0%}")
        )
    manifest = result.manifest
    smallest, preferred, largest = manifest.profile
    console.print(
        f"{result.engine_path}: {result.engine_bytes / 1e6:.1f} MB, {manifest.backend} {manifest.version},"
        f" {manifest.precision},"
        f" batch {smallest} to {largest} (tuned for {preferred}), built in {result.seconds:.1f} s",
        highlight=False,
    )
