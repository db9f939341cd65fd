"""`asag serve-repository`."""

from __future__ import annotations

from pathlib import Path

import click

from asag.cli.console import EXISTING_FILE, FOLDER, HELP, console


@click.command(
    "serve-repository",
    context_settings=HELP,
    short_help="Write a model repository for Triton Inference Server.",
)
@click.argument("model", type=EXISTING_FILE)
@click.option("-o", "--output", type=FOLDER, required=True, help="The repository: a folder with a folder per model.")
@click.option("--name", help="Name that the model is served under; its preset by default.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What an exported file runs on; an engine always runs on a GPU.",
)
@click.option("--max-batch", type=click.IntRange(1), help="Most images at once; an engine's own limit, else 8.")
@click.option("--instances", type=click.IntRange(1), default=1, show_default=True, help="Copies per device.")
@click.option(
    "--queue-delay",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    help="Microseconds that a request may wait for others to share its batch.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each copy; the server's choice by default.")
def serve_repository(
    model: Path,
    output: Path,
    name: str | None,
    device: str,
    max_batch: int | None,
    instances: int,
    queue_delay: int,
    threads: int | None,
) -> None:
    """Write a model repository for Triton Inference Server from MODEL (.onnx or .engine).

    An exported file is served by Triton's ONNX Runtime backend. A TensorRT-RTX engine is served by the Python backend
    through this package, since Triton's TensorRT backend opens engines of TensorRT only.
    """
    from asag.runtime.serving.repository import write_repository

    folder = write_repository(
        model,
        output,
        name=name,
        device=device,
        max_batch=max_batch,
        instances=instances,
        queue_delay_us=queue_delay,
        threads=threads,
    )
    console.print(f"{folder}: tritonserver --model-repository={output.resolve()}", highlight=False, soft_wrap=True)
