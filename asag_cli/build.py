"""`asag build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from asag_cli.console import EXISTING_FILE, HELP, OUTPUT_FILE, console


class BatchType(click.ParamType):
    """Batch sizes with colons between them, such as 1:4:16; any number of them."""

    name = "SIZES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse the text; a tuple is taken as it is."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(":")
        if not all(part.isdecimal() and len(part) < 6 for part in parts):
            self.fail(f"{value!r} is no list of batch sizes; write them like 1:4:16", param, ctx)
        return tuple(int(part) for part in parts)


class TargetsType(click.ParamType):
    """GPU architectures with commas between them, such as sm_86,sm_89."""

    name = "ARCHITECTURES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split the text; the builder knows the names."""
        return value if isinstance(value, tuple) else tuple(part.strip() for part in str(value).split(","))


@click.command(context_settings=HELP, short_help="Build a TensorRT engine from an exported file.")
@click.argument("model", type=EXISTING_FILE)
@click.option("-o", "--output", type=OUTPUT_FILE, required=True, help="The .engine file to write.")
@click.option(
    "--backend",
    type=click.Choice(["tensorrt-rtx"]),
    default="tensorrt-rtx",
    show_default=True,
    help="TensorRT for RTX: its builder needs no GPU; the engine runs on compute capability 8.x and 12.x.",
)
@click.option(
    "--batch",
    type=BatchType(),
    default="1:4",
    show_default=True,
    help="Batch sizes to tune for, rising. Each gets a profile of its own, which also serves the sizes down to the one"
    " before: 1:4:16 runs one image on the first, 2 to 4 on the second and 5 to 16 on the third.",
)
@click.option(
    "--target",
    "targets",
    type=TargetsType(),
    default=(),
    help="GPU architectures to build for, such as sm_86,sm_89; sm_80 and later by default.",
)
@click.option("--log", type=OUTPUT_FILE, help="File for everything that the builder says.")
def build(
    model: Path, output: Path, backend: str, batch: tuple[int, ...], targets: tuple[str, ...], log: Path | None
) -> None:
    """Build an engine from MODEL (.onnx).

    Works on a machine without a GPU. The bodies of the `asag` ops are inlined first. Precision is decided in the ONNX
    file (`asag export --precision`); TF32 is off. Beside the engine a manifest (OUTPUT.json) records the digest of the
    ONNX file, versions, precision, batch profiles and the network's layers; `asag inspect` shows it.
    """
    from runtime.engine_build import build_engine

    with console.status("building") as status:
        result = build_engine(
            model,
            output,
            batch,
            progress=lambda phase, done: status.update(f"building: {phase} {done:.0%}"),
            targets=targets,
            log_path=log,
        )
    manifest = result.manifest
    console.print(
        f"{result.engine_path}: {result.engine_bytes / 1e6:.1f} MB, {manifest.backend} {manifest.version},"
        f" {manifest.precision}, batch {manifest.smallest_batch} to {manifest.largest_batch}"
        f" (tuned for {', '.join(str(preferred) for _, preferred, _ in manifest.profiles)}),"
        f" {sum(manifest.layers.values())} layers before fusion, built in {result.seconds:.1f} s",
        highlight=False,
    )
