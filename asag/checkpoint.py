"""Our checkpoints: weights as safetensors, with everything needed to rebuild the detector in the file's metadata."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from asag.config import DetectorConfig
from asag.detector import Detector, build_detector

_KEY = "asag"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint knows about its data besides the tensors."""

    preset: str
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]
    shorter_side: int = 800
    longer_side: int = 1333
    """Images are resized to this shorter side, in pixels, unless the longer one would pass its limit."""
    input_size: tuple[int, int] = (800, 1344)
    """Height and width, in pixels, of the exported model's input unless the exporter is told otherwise."""
    patch_capacity: tuple[int, int] = (64, 128)
    """Patches per image that the exported model has room for on P4 and P3."""

    def __post_init__(self) -> None:
        if len(self.category_ids) != len(self.category_names):
            raise ValueError(f"{len(self.category_ids)} category ids for {len(self.category_names)} category names")


def save_detector(path: str | Path, detector: Detector, info: CheckpointInfo) -> None:
    """Write weights and metadata to `path` (.safetensors), whole or not at all."""
    path = Path(path)
    if len(info.category_ids) != detector.config.classes:
        raise ValueError(f"{len(info.category_ids)} categories for a detector of {detector.config.classes} classes")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in detector.state_dict().items()}
    description = {"config": detector.config.to_dict(), "info": dataclasses.asdict(info)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        ordinary = temporary.stat().st_mode  # the library would leave a file that only its owner can read
        safetensors.torch.save_file(tensors, temporary, {_KEY: json.dumps(description)})
        temporary.chmod(ordinary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_detector(path: str | Path) -> tuple[Detector, CheckpointInfo]:
    """Read a checkpoint of :func:`save_detector`; the detector is in evaluation mode on the CPU.

    Raises FileNotFoundError, or ValueError with one line saying what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); copy or train it again") from None
    try:
        description = json.loads(metadata[_KEY])
        config = DetectorConfig.from_dict(description["config"])
        values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in description["info"].items()}
        info = CheckpointInfo(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: no asag description in the file ({error}); "
            "for a published checkpoint run `asag zoo convert` first"
        ) from None
    try:
        detector = build_detector(config)
        detector.load_state_dict(tensors)
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: the tensors do not fit its configuration: {reason}") from None
    return detector, info
