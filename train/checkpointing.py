"""The state of a run on disk: what resuming needs, besides the weights that are shared."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from asag.detector import Detector
from runtime.files import atomic_path

STATE_FILE = "state.pt"
_FORMAT = 1


@dataclass
class TrainingState:
    """Everything that changes while a detector trains. `step` counts the finished optimizer steps."""

    detector: Detector
    average: AveragedModel | None
    optimizer: AdamW
    schedule: LambdaLR
    generator: torch.Generator
    """Draws the training-time patches and noise; on the CPU."""
    step: int = 0

    @property
    def deployable(self) -> Detector:
        """The detector whose weights are saved for use and evaluated: the average where there is one."""
        if self.average is None:
            return self.detector
        averaged = self.average.module
        assert isinstance(averaged, Detector)
        return averaged


def save_state(path: str | Path, state: TrainingState, computation: Mapping[str, Any]) -> None:
    """Write the state to a temporary file and rename it to `path`.

    The file holds the trained weights too, so that a kill between two files cannot pair weights and optimizer of
    different steps. It loads with ``torch.load(weights_only=True)``. `computation` (JSON values) is what a run that
    goes on from here must agree on.
    """
    content = {
        "format": _FORMAT,
        "step": state.step,
        "configuration": json.dumps(dict(computation)),
        "detector": state.detector.state_dict(),
        "average": None if state.average is None else state.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "random": {
            "generator": state.generator.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_state(path: str | Path, state: TrainingState, computation: Mapping[str, Any]) -> None:
    """Bring `state` and the random numbers of this process to where the run in `path` stood.

    Raises FileNotFoundError without such a file, and ValueError when it is damaged, or when the run in it differs in
    `computation`.
    """
    path = Path(path)
    content = _read(path)
    _check_configuration(path, json.loads(content["configuration"]), json.loads(json.dumps(dict(computation))))
    try:
        state.detector.load_state_dict(content["detector"])
        if state.average is not None:
            state.average.load_state_dict(content["average"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.schedule.load_state_dict(content["schedule"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not fit this detector ({reason}): train anew in another folder") from None
    state.step = content["step"]
    state.generator.set_state(content["random"]["generator"])
    torch.set_rng_state(content["random"]["torch"])
    for index, random_state in enumerate(content["random"]["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(random_state, index)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: no {path}; start the run without resuming")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a foreign file is refused below, in words of ours
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason[:120]}): start the run anew in another folder") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a training state of this version: start the run anew in another folder")
    return content


def _check_configuration(path: Path, recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    differing = sorted(name for name in {*recorded, *current} if recorded.get(name) != current.get(name))
    if differing:
        changes = ", ".join(f"{name} {recorded.get(name)} -> {current.get(name)}" for name in differing)
        raise ValueError(
            f"{path} belongs to a run with another configuration ({changes}): use the same or another folder"
        )


def has_run(folder: str | Path) -> bool:
    """Whether a folder already holds the state of a run."""
    return (Path(folder) / STATE_FILE).exists()
