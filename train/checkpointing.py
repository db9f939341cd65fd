"""The states of a run on disk: what resuming needs. The last few are kept."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.amp import GradScaler
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from asag.detector import Detector
from asag.runtime.files import atomic_path

logger = logging.getLogger(__name__)

STATES_FOLDER = "checkpoints"
_FORMAT = 2
_NAME = re.compile(r"state-(\d+)\.pt")


@dataclass
class TrainingState:
    """Everything that changes while a detector trains. `step` counts the finished optimizer steps."""

    detector: Detector
    average: AveragedModel | None
    optimizer: AdamW
    schedule: LambdaLR
    scaler: GradScaler = field(default_factory=lambda: GradScaler("cpu", enabled=False))
    """Scales the loss where the features are float16; else it does nothing."""
    step: int = 0

    @property
    def deployable(self) -> Detector:
        """The detector whose weights are saved for use and evaluated: the average where there is one."""
        if self.average is None:
            return self.detector
        averaged = self.average.module
        assert isinstance(averaged, Detector)
        return averaged


def state_path(folder: str | Path, step: int) -> Path:
    """Where a run in `folder` keeps its state after `step` steps."""
    return Path(folder) / STATES_FOLDER / f"state-{step:08d}.pt"


def kept_states(folder: str | Path) -> list[tuple[int, Path]]:
    """The states of the run in `folder` as (step, file), the newest last."""
    found = []
    for path in (Path(folder) / STATES_FOLDER).glob("state-*.pt"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found)


def has_run(folder: str | Path) -> bool:
    """Whether a folder already holds the state of a run."""
    return bool(kept_states(folder))


def keep_state(folder: str | Path, state: TrainingState, computation: Mapping[str, Any], keep: int) -> Path:
    """Write the state of the run in `folder`, then drop all but the `keep` newest ones. Returns its file.

    Raises OSError, with the older states as they were, when it cannot be written, on a full disk for example.
    """
    path = state_path(folder, state.step)
    save_state(path, state, computation)
    # States after this step are left over from a later part of a run that was resumed from an older state.
    older = [other for step, other in kept_states(folder) if step < state.step]
    newer = [other for step, other in kept_states(folder) if step > state.step]
    for other in [*older[: max(len(older) - keep + 1, 0)], *newer]:
        other.unlink(missing_ok=True)
    return path


def save_state(path: str | Path, state: TrainingState, computation: Mapping[str, Any]) -> None:
    """Write the state to a temporary file and rename it to `path`.

    The file holds the trained weights too, so that a kill between two files cannot pair weights and optimizer of
    different steps. It loads with ``torch.load(weights_only=True)``. `computation` (JSON values) is what a run that
    goes on from here must agree on. Raises OSError, saying why, when it cannot be written whole.
    """
    content = {
        "format": _FORMAT,
        "step": state.step,
        "configuration": json.dumps(dict(computation)),
        "detector": state.detector.state_dict(),
        "average": None if state.average is None else state.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "scaler": state.scaler.state_dict(),
        "random": {
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        },
    }
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            # Renaming must not reach the disk before the content does.
            os.fsync(stream.fileno())
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write {path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Why writing failed: torch's writer hides the system's error, a full disk for example, behind one of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of a run that was killed while it wrote."""
    for place, pattern in ((Path(folder) / STATES_FOLDER, ".state-*"), (Path(folder), ".*.safetensors.*")):
        for path in place.glob(pattern):
            path.unlink(missing_ok=True)


def resume_state(folder: str | Path, state: TrainingState, computation: Mapping[str, Any]) -> Path:
    """Bring `state` to the newest state of the run in `folder` that can be read; returns its file.

    A damaged file is passed over with a warning as long as there is an older one. Raises what `load_state` raises.
    """
    found = [path for _, path in reversed(kept_states(folder))]
    if not found:
        raise FileNotFoundError(f"nothing to resume: no {STATES_FOLDER}/state-*.pt in {folder}; start without resuming")
    for path in found[:-1]:
        try:
            read_state(path)
        except ValueError as error:
            logger.warning("%s; going back to an older state", error)
        else:
            load_state(path, state, computation)
            return path
    load_state(found[-1], state, computation)
    return found[-1]


def load_state(path: str | Path, state: TrainingState, computation: Mapping[str, Any]) -> None:
    """Bring `state` and the random numbers of this process to where the run in `path` stood.

    Raises FileNotFoundError without such a file, and ValueError when it is damaged, or when the run in it differs in
    `computation`.
    """
    path = Path(path)
    content = read_state(path)
    _check_configuration(path, json.loads(content["configuration"]), computation)
    try:
        state.detector.load_state_dict(content["detector"])
        if state.average is not None:
            state.average.load_state_dict(content["average"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.schedule.load_state_dict(content["schedule"])
        if content["scaler"]:
            state.scaler.load_state_dict(content["scaler"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not fit this detector ({reason}): train anew in another folder") from None
    state.step = content["step"]
    torch.set_rng_state(content["random"]["torch"])
    if torch.cuda.is_available():
        for random_state in content["random"]["cuda"]:
            torch.cuda.set_rng_state(random_state)


def read_state(path: Path) -> dict[str, Any]:
    """The content of a state's file. Raises FileNotFoundError, or ValueError when it is damaged or something else."""
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
    # An option that a version lacks is one that is off.
    off: tuple[Any, ...] = (None, False, [])
    differing = sorted(
        name
        for name in {*recorded, *current}
        if recorded.get(name) != current.get(name) and not (recorded.get(name) in off and current.get(name) in off)
    )
    if differing:
        changes = ", ".join(f"{name} {recorded.get(name)} -> {current.get(name)}" for name in differing)
        raise ValueError(
            f"{path} belongs to a run with another configuration ({changes}): use the same or another folder"
        )
