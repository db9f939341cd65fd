"""`asag build`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asag.cli.console import DATASET, EXISTING_FILE, FOLDER, HELP, OUTPUT_FILE, console

if TYPE_CHECKING:
    from asag.runtime.engines.manifest import EngineManifest


MEASURED_IMAGES = 128
"""Images at most on which the values of an adopted file are measured for fp16."""


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
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    default="tensorrt-rtx",
    show_default=True,
    help="tensorrt builds on a GPU, for this GPU, with kernels of its own for the `asag` ops. tensorrt-rtx (TensorRT"
    " for RTX) builds on any machine, for GPUs of compute capability 8.0, 8.6, 8.9 and 12.x.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    help="Precision of the engine; that of MODEL by default. MODEL must be in fp32 to become another.",
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
    help="GPU architectures to build for, such as sm_86,sm_89; sm_80 and later by default. tensorrt knows only the GPU"
    " at hand, and refuses another.",
)
@click.option(
    "--ops",
    type=click.Choice(["plugins", "inlined"]),
    help="What becomes of the `asag` ops: kernels inside the engine (tensorrt's default), or standard operators (the"
    " only way of tensorrt-rtx).",
)
@click.option("--workspace", type=click.IntRange(1), metavar="MIB", help="Limit of a layer's scratch memory, in MiB.")
@click.option("--tf32", is_flag=True, help="Let float32 products be rounded to TF32; off unless asked for.")
@click.option(
    "--timing-cache",
    type=OUTPUT_FILE,
    help="File of kernel timings, read where it exists and written after the build; tensorrt only.",
)
@click.option(
    "--calibration",
    type=FOLDER,
    help="For int8, and for fp16 of an adopted file: images like those the model will see. What passes 8,000 on them"
    " stays float32.",
)
@click.option("--data", type=DATASET, help="For int8: dataset to measure AP on.")
@click.option(
    "--max-ap-drop",
    type=click.FloatRange(0, 1),
    help="For int8: AP that it may cost on --data; the layers that cost most go back to fp16 until it holds.",
)
@click.option("--log", type=OUTPUT_FILE, help="File for everything that the builder says.")
def build(
    model: Path,
    output: Path,
    backend: str,
    precision: str | None,
    batch: tuple[int, ...],
    targets: tuple[str, ...],
    ops: str | None,
    workspace: int | None,
    tf32: bool,
    timing_cache: Path | None,
    calibration: Path | None,
    data: Path | None,
    max_ap_drop: float | None,
    log: Path | None,
) -> None:
    """Build an engine from MODEL (.onnx).

    An engine keeps the types of its file. With --precision, MODEL is converted first, as `asag export --precision` and
    `asag quantize` would; boxes, thresholds, norms and softmax stay float32. Beside the engine a manifest (OUTPUT.json)
    records the digest of MODEL, versions, precision, batch profiles, GPU architectures and layers before and after
    fusion; `asag inspect` shows it. The engine appears whole or not at all.
    """
    from asag.runtime.engines.backend import BACKENDS
    from asag.runtime.engines.build import BuildOptions, build_engine, check_build

    options = BuildOptions(BACKENDS[backend], batch, targets, ops, workspace, tf32, timing_cache)
    int8 = {"calibration": calibration, "data": data, "max_ap_drop": max_ap_drop}
    given = [name.replace("_", "-") for name, value in int8.items() if value is not None]
    if given and precision != "int8" and (given != ["calibration"] or precision != "fp16"):
        raise click.UsageError(f"--{given[0]} is for --precision int8")
    check_build(output, options)
    with tempfile.TemporaryDirectory(prefix="asag-build-") as folder:
        prepared = model
        if precision is not None:
            prepared = _in_precision(model, precision, Path(folder) / model.name, int8)
        with console.status("building") as status:
            result = build_engine(
                prepared,
                output,
                options,
                progress=lambda phase, done: status.update(f"building: {phase} {done:.0%}"),
                log_path=log,
                source=model,
            )
    manifest = result.manifest
    console.print(
        f"{result.engine_path}: {result.engine_bytes / 1e6:.1f} MB, {manifest.backend} {manifest.version},"
        f" {manifest.precision}{', TF32' if manifest.tf32 else ''}, batch {manifest.smallest_batch} to"
        f" {manifest.largest_batch} (tuned for {', '.join(str(preferred) for _, preferred, _ in manifest.profiles)}),"
        f" {_what_became(manifest)}, built in {result.seconds:.1f} s",
        highlight=False,
    )


def _in_precision(model: Path, precision: str, output: Path, int8: Mapping[str, Any]) -> Path:
    """The model in the precision: the file itself where it is, else `output`, which is then written."""
    from asag.cli.quantize import quantize
    from asag.export.conversion import convert_file, needs_conversion

    if not needs_conversion(model, precision):
        return model
    if precision == "int8":
        if int8["calibration"] is None:
            raise click.UsageError(
                "--precision int8 needs --calibration FOLDER, with images like those the model will see"
            )
        click.get_current_context().invoke(quantize, model=model, output=output, **int8)
    else:
        from asag.runtime.image_source import images_in

        images = [] if int8["calibration"] is None else images_in(int8["calibration"])[:MEASURED_IMAGES]
        with console.status(f"converting to {precision}"):
            kept = convert_file(model, output, precision, images)
        for name in kept or ():
            console.print(f"above 8,000 on an image, stays float32: {name}", highlight=False, soft_wrap=True)
        if kept is not None and not images:
            console.print(
                "how large values become was measured on made-up pictures; --calibration FOLDER measures on yours",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )
    return output


def _what_became(manifest: EngineManifest) -> str:
    """The `asag` ops and the layers, in words."""
    plugins = ", ".join(f"{count} {name}" for name, count in manifest.plugins.items())
    ops = f"plugins {plugins}" if plugins else "asag ops inlined"
    layers = f"{sum(manifest.layers.values())} layers"
    if manifest.engine_layers is not None:
        profiles = len(manifest.profiles)
        layers += f" fused to {sum(manifest.engine_layers.kernels.values())}"
        layers += f" in {profiles} profiles" if profiles > 1 else ""
    return f"{ops}, {layers}"
