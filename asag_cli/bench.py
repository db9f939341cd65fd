"""`asag bench`."""

from __future__ import annotations

from pathlib import Path

import click

from asag_cli.console import EXISTING_FILE, OUTPUT_FILE, console, device_option, progress_bar, threads_option


@click.command(short_help="Latency of models, measured in turn.")
@click.argument("models", nargs=-1, required=True, type=EXISTING_FILE)
@click.option("--images", required=True, type=click.Path(path_type=Path), help="An image or a folder of them.")
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True, help="Measured runs of each model.")
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True, help="Runs before that do not count.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Images that run together.")
@click.option("--json", "json_path", type=OUTPUT_FILE, help="Also write the numbers to this file.")
@device_option
@threads_option
def bench(
    models: tuple[Path, ...],
    images: Path,
    rounds: int,
    warmup: int,
    batch_size: int,
    json_path: Path | None,
    device: str,
    threads: int | None,
) -> None:
    """Measure MODELS on the same images, one after another in every round, from decoded pixels to detections.

    Ratios are to the first model, round by round, with their 10th and 90th percentile; where these leave 1 in between,
    the difference is noise and is not called one. A model that cannot run here is named with the reason.
    """
    from runtime.benchmark import benchmark_table, measure
    from runtime.detect import expand_paths
    from runtime.files import write_json
    from runtime.parity import Unavailable, open_candidate

    opened = [open_candidate(path, device=device, threads=threads) for path in models]
    missing = [model for model in opened if isinstance(model, Unavailable)]
    sessions = [model for model in opened if not isinstance(model, Unavailable)]
    for model in missing:
        console.print(f"{model.name} ({model.backend}) was not run: {model.reason}", style="yellow", highlight=False)
    if not sessions:
        raise ValueError("none of the models can run on this machine")
    with progress_bar("measuring") as advance:
        result = measure(
            sessions,
            expand_paths([images])[:64],
            rounds=rounds,
            warmup=warmup,
            batch_size=batch_size,
            progress=advance,
        )
    console.print(benchmark_table(result))
    if json_path is not None:
        write_json(json_path, result.to_json())
