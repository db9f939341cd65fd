"""A training run in a process of its own, for tests that need several or kill one: ``child_run.py config.json``.

With the variable ASAG_TEST_GRADIENTS the first process writes the gradients of every step to that folder; with
ASAG_TEST_BUFFERS every process writes the buffers of its detector and of the average after every step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from asag import families
from asag.families.adamixer import ADAMIXER
from asag.families.asag import ASAG
from asag.family import Family, InputSpec
from asag.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
MICRO, FROZEN, RECOLLECTED = "micro", "micro-frozen", "micro-recollected"


def micro_families() -> tuple[Family, ...]:
    """The families, with presets of tiny networks on 96-pixel images: norms that learn, norms that stay, and one that
    trains with recollected queries.
    """
    tiny = ASAG.presets["asag-a-tiny"]
    size = dataclasses.replace(tiny.config.size, backbone_width=8, anchor_hidden=32, feed_forward=32)
    learning = dataclasses.replace(tiny.config, size=size)
    frozen = dataclasses.replace(learning, train_batch_statistics=False)
    micro = dataclasses.replace(tiny, config=learning, input=InputSpec(96, 96, (96, 96)))
    presets = {**ASAG.presets, MICRO: micro, FROZEN: dataclasses.replace(micro, config=frozen)}
    other = ADAMIXER.presets["adamixer-tiny"]
    size = dataclasses.replace(other.config.size, backbone_width=8, feed_forward=32)
    config = dataclasses.replace(other.config, size=size, queries=12, train_batch_statistics=False)
    recollected = {**ADAMIXER.presets, RECOLLECTED: dataclasses.replace(other, config=config, input=micro.input)}
    made = {ASAG.name: presets, ADAMIXER.name: recollected}
    return tuple(
        dataclasses.replace(family, presets=made.get(family.name, family.presets)) for family in families.FAMILIES
    )


def start(config: TrainConfig, folder: Path, **variables: str) -> subprocess.Popen[str]:
    """Start this file in a new process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "child.json"
    path.write_text(json.dumps(config.to_dict()))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, str(Path(__file__)), str(path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def record_gradients(folder: Path) -> None:
    """From now on every step of this process writes its gradients to ``folder/<step>.pt``."""
    from asag.train.step import StepMaker

    make = StepMaker.make

    def recording(self, pieces, epoch):  # type: ignore[no-untyped-def]
        result = make(self, pieces, epoch)
        named = self._state.detector.named_parameters()
        found = {name: parameter.grad for name, parameter in named if parameter.requires_grad}
        torch.save(found, folder / f"{self._state.step}.pt")
        return result

    StepMaker.make = recording  # type: ignore[method-assign]


def record_buffers(path: Path) -> None:
    """From now on every step of this process writes the buffers of its detector, and its average whole, to a file."""
    from asag.train.step import StepMaker

    make = StepMaker.make

    def recording(self, pieces, epoch):  # type: ignore[no-untyped-def]
        result = make(self, pieces, epoch)
        found = dict(self._state.detector.named_buffers())
        found |= {f"average.{name}": value for name, value in self._state.average.state_dict().items()}
        torch.save(found, path)
        return result

    StepMaker.make = recording  # type: ignore[method-assign]


def main() -> None:
    from asag.train.loop import train

    torch.set_num_threads(1)
    families.FAMILIES = micro_families()
    values = json.loads(Path(sys.argv[1]).read_text())
    folder = os.environ.get("ASAG_TEST_GRADIENTS")
    if folder and os.environ.get("RANK") == "0":
        record_gradients(Path(folder))
    if buffers := os.environ.get("ASAG_TEST_BUFFERS"):
        record_buffers(Path(buffers) / f"buffers-{os.environ['RANK']}.pt")
    print("losses", json.dumps(train(TrainConfig.of(values), progress=True).losses))


if __name__ == "__main__":
    main()
