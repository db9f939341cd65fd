"""How fast a detector trains here, with how much memory, and where the time goes: `python -m benchmarks.training`."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch.amp import GradScaler

from asag.families import family_of
from asag.runtime.files import write_json
from asag.train.checkpointing import TrainingState
from asag.train.config import TrainConfig
from asag.train.devices import resolve_device
from asag.train.initialization import untrained_detector
from asag.train.processes import Processes
from asag.train.reporting import peak_memory
from asag.train.schedule import build_optimizer, build_schedule
from asag.train.step import Piece, StepMaker, feature_precision, prepare_detector
from asag.train.transforms import Batch, Sample, collate
from asag.training.timing import shares

OBJECTS = 7
"""Objects of an image: COCO's mean."""


@dataclass(frozen=True)
class Profile:
    """Steps that were measured. `seconds` and `cpu_seconds` (of all threads) are means over a step."""

    seconds: float
    cpu_seconds: float
    memory_bytes: int
    """At most in use: of the GPU's memory by torch, or of the process."""
    shares: Mapping[str, float]
    """Share of the time by part, 0..1."""


def profile_training(config: TrainConfig, height: int, width: int, steps: int, epoch: int) -> Profile:
    """Train on random pictures of `height` x `width` pixels with 7 objects each; reading images is not measured.

    One step before the measured ones warms up. On a GPU the parts are measured in steps of their own, because
    telling them apart makes a step slower.
    """
    device = resolve_device(config.device)
    torch.manual_seed(config.seed)
    detector = untrained_detector(config)
    prepare_detector(detector, config, device)
    training = family_of(detector.config).training(detector, config.settings)
    optimizer = build_optimizer(training.parameter_groups(), config)
    scaler = GradScaler(device.type, enabled=feature_precision(config, device) == torch.float16)
    state = TrainingState(detector, None, optimizer, build_schedule(optimizer, config, steps, steps), scaler)
    maker = StepMaker(state, training, config, Processes(), device)
    pieces = random_pieces(config, height, width, detector.config.classes)

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            maker.make(pieces, epoch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    run(1)
    maker.timer.take()
    cpu = _cpu_seconds()
    seconds = run(steps)
    cpu = _cpu_seconds() - cpu
    if device.type == "cuda":
        maker.timer.enabled = maker.timer.synchronize = True
        run(steps)
    return Profile(seconds / steps, cpu / steps, peak_memory(), shares(maker.timer.take()))


def random_pieces(config: TrainConfig, height: int, width: int, classes: int) -> list[Piece]:
    """The pieces of one step on noise; objects of all sizes, a third of them small enough for probing."""
    generator = np.random.default_rng(0)
    pieces = []
    for number, images in enumerate(np.array_split(np.arange(config.batch_size), config.accumulate)):
        samples = []
        for _ in images:
            pixels = generator.integers(0, 256, (3, height, width), dtype=np.uint8)
            sides = np.exp(generator.uniform(np.log(0.02), np.log(0.6), (OBJECTS, 2)))
            centres = generator.uniform(sides / 2, 1 - sides / 2)
            boxes = torch.from_numpy(np.concatenate((centres, sides), axis=1)).float()
            labels = torch.from_numpy(generator.integers(0, classes, OBJECTS))
            samples.append(Sample(torch.from_numpy(pixels), boxes, labels))
        batch: Batch = collate(samples)
        pieces.append(Piece(batch, [(0, number * len(images) + place) for place in range(len(images))]))
    return pieces


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def describe(profile: Profile, config: TrainConfig) -> str:
    """A few lines for a person."""
    rate = f"{1 / profile.seconds:.3f} steps/s, {config.batch_size / profile.seconds:.2f} images/s"
    parts = ", ".join(f"{name} {share:.2%}" for name, share in profile.shares.items())
    return (
        f"{config.preset}, {config.batch_size} images a step: {profile.seconds:.2f} s a step ({rate})\n"
        f"processor time {profile.cpu_seconds:.2f} s a step, memory at most {profile.memory_bytes / 2**30:.2f} GiB\n"
        f"{parts}"
    )


@click.command()
@click.option("--preset", default="asag-a-r50-1x-100", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=2, show_default=True)
@click.option("--height", type=click.IntRange(32), default=800, show_default=True)
@click.option("--width", type=click.IntRange(32), default=1333, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Steps that are measured.")
@click.option("--epoch", type=click.IntRange(0), default=0, show_default=True, help="0 takes patches from objects.")
@click.option("--device", default="auto", show_default=True)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Another field of the configuration.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the numbers there too.")
def main(
    preset: str,
    batch_size: int,
    height: int,
    width: int,
    steps: int,
    epoch: int,
    device: str,
    settings: tuple[str, ...],
    json_file: Path | None,
) -> None:
    """Measure training steps on random pictures."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    config = TrainConfig.for_preset(preset, ".", ".", batch_size=batch_size, device=device, **values)
    profile = profile_training(config, height, width, steps, epoch)
    click.echo(describe(profile, config))
    if json_file is not None:
        write_json(json_file, asdict(profile))


if __name__ == "__main__":
    main()
