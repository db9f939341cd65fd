"""Reading other people's files of tensors, without running anything that is in them."""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

TENSORS_UNDER = ("model", "state_dict", "ema_state_dict")
"""Where training programs put the tensors of a checkpoint, in the order of preference."""

_LEGACY_GLOBALS: list[Any] = [argparse.Namespace, collections.Counter, collections.defaultdict, pathlib.PosixPath]
"""What files of the format before PyTorch 1.6 hold besides tensors; nothing tells beforehand what is in them."""


@dataclass(frozen=True)
class ForeignFile:
    """Tensors by the names that their authors gave them, and what stands beside them."""

    path: Path
    tensors: dict[str, Tensor]
    description: Mapping[str, Any] = field(default_factory=dict)
    """`config.json` of a Hugging Face folder, or `meta` of an MMDetection checkpoint; else empty."""


def read_foreign(path: str | Path) -> ForeignFile:
    """Read a `.pth` file, a safetensors file, or a Hugging Face folder (`config.json` and `model.safetensors`).

    A `.pth` file may hold objects of any class beside its tensors (arguments, logs, optimizers): they become empty
    stand-ins. Raises FileNotFoundError, or ValueError with one line, when the file is missing, damaged, or none of
    these.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.suffix.lower() == ".safetensors":
        return ForeignFile(path, _read_safetensors(path))
    content = _read_torch(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds no dictionary of tensors")
    state = next((content[name] for name in TENSORS_UNDER if isinstance(content.get(name), Mapping)), content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        places = " or ".join(repr(name) for name in TENSORS_UNDER[:2])
        raise ValueError(f"{path}: holds no dictionary of tensors, by itself or under {places}")
    meta = content.get("meta")
    return ForeignFile(path, dict(state), dict(meta) if isinstance(meta, Mapping) else {})


def _read_folder(path: Path) -> ForeignFile:
    weights, config = path / "model.safetensors", path / "config.json"
    if not weights.is_file():
        raise FileNotFoundError(f"{path}: a folder without {weights.name}; name a checkpoint or a Hugging Face folder")
    try:
        description = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{config}: cannot be read as JSON ({error})") from None
    if not isinstance(description, dict):
        raise ValueError(f"{config}: holds no JSON object")
    return ForeignFile(path, _read_safetensors(weights), description)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); download it again") from None


class _StandIn(dict[Any, Any]):
    """An object of a class that is not known here: takes any arguments and state, and keeps nothing that can run."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """Forget it."""

    def append(self, _: object) -> None:
        """As a list would."""

    add = extend = append


def _read_torch(path: Path) -> Any:
    """What a file of `torch.save` holds, with stand-ins for objects of unknown classes."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, OSError, pickle.UnpicklingError, EOFError, KeyError):
        unknown = []  # the format before PyTorch 1.6, or no such file, which is found out below
    # A class of its own for each name: the reader tells them apart by it.
    stand_ins: list[Any] = [(type("StandIn", (_StandIn,), {}), name) for name in unknown]
    try:
        with torch.serialization.safe_globals(stand_ins or _LEGACY_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: no PyTorch file, or one that cannot be read without running code in it; download it again, or"
            " save only its dictionary of tensors"
        ) from None
    except Exception as error:  # a damaged file raises anything from within the reader
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"{path}: damaged or no PyTorch file ({reason}); download it again") from None
