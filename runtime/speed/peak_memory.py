"""The most memory a model takes in a process of its own: `python -m runtime.speed.peak_memory MODEL`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np


def peak_memory_mib(path: Path, device: str = "cpu", threads: int | None = None, batch_size: int = 1) -> float | None:
    """Peak resident memory in MiB of a fresh process that opens the model and runs a batch; None when it fails.

    It counts the interpreter and the backend's libraries, as whoever deploys the model has to.
    """
    command = [sys.executable, "-m", "asag.runtime.speed.peak_memory", str(path), "--device", device]
    command += ["--batch-size", str(batch_size), *(["--threads", str(threads)] if threads else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    return float(json.loads(done.stdout)["peak_mib"])


@click.command()
@click.argument("model", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--device", default="cpu", help="cpu, cuda or cuda:INDEX.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--batch-size", type=click.IntRange(1), default=1, help="Images that run together.")
def main(model: Path, device: str, threads: int | None, batch_size: int) -> None:
    """Run MODEL twice on grey images and print the process's peak memory as JSON."""
    from asag.runtime.opening import open_session

    with open_session(model, device=device, threads=threads) as session:
        height, width = session.metadata.input_size
        grey = np.full((height, width, 3), 127, np.uint8)
        for _ in range(2):
            session.detect([grey] * batch_size, batch_size)
    click.echo(json.dumps({"peak_mib": _own_peak_mib()}))


def _own_peak_mib() -> float:
    """From the kernel's account of this program: `getrusage` would count the process that started it as well."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the kernel does not tell the peak memory of a process")


if __name__ == "__main__":
    main()
