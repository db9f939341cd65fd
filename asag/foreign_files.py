"""Reading other people's files of tensors, without running anything that is in them."""

from __future__ import annotations

import argparse
import collections
import json
import pickle
import re
import types
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

TENSORS_UNDER = ("model", "state_dict", "ema_state_dict", "online_network_state_dict")
"""Where training programs put the tensors of a checkpoint, in the order of preference."""


@dataclass(frozen=True)
class ForeignFile:
    """Tensors by the names that their authors gave them, and what stands beside them."""

    path: Path
    tensors: dict[str, Tensor]
    description: Mapping[str, Any] = field(default_factory=dict)
    """`config.json` of a Hugging Face folder, `meta` of an MMDetection checkpoint, or the arguments of the program that
    wrote a file; else empty."""


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
    meta, arguments = content.get("meta"), content.get("args")
    if isinstance(arguments, argparse.Namespace):
        meta = vars(arguments)
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
    """An object of a class that is not known here: takes any arguments, items and state, and does nothing with them."""

    def __hash__(self) -> int:  # type: ignore[override]
        """Such objects may be keys."""
        return id(self)

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __call__(self, *_: object, **__: object) -> _StandIn:
        """What a function would give."""
        return _StandIn()

    def __setstate__(self, state: object) -> None:
        """Forget it."""

    def append(self, _: object) -> None:
        """As a list would."""

    add = extend = append


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("argparse", "Namespace"): argparse.Namespace,
    **{("torch._utils", name): getattr(torch._utils, name) for name in ("_rebuild_tensor", "_rebuild_tensor_v2")},
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    **{("torch", str(kind).removeprefix("torch.")): kind for kind in (torch.float32, torch.float16, torch.bfloat16)},
}
"""What tensors are rebuilt by, and a plain record of arguments; PyTorch itself adds the classes of storages. Nothing
else in a file is looked up."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        """What a file may name: see :data:`_KNOWN`; anything else is a stand-in."""
        return _KNOWN.get((module_name, global_name), _StandIn)


def _load_plain(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_PICKLE: Any = types.SimpleNamespace(__name__="pickle of tensors", Unpickler=_Unpickler, load=_load_plain)


def _read_torch(path: Path) -> Any:
    """What a file of `torch.save` holds, with stand-ins for objects of unknown classes."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of the old format's storages
            return torch.load(path, map_location="cpu", pickle_module=_PICKLE, weights_only=False)
    except Exception as error:  # a damaged file raises anything from within the reader
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"{path}: damaged or no PyTorch file ({reason}); download it again") from None


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """A tensor's name by the first rule (pattern of the beginning, replacement) that fits it; None where none does."""
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", replacement, name)
    return None
