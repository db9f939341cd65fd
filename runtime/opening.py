"""Opening a model file with the backend that its suffix names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from asag.runtime.session import Session, check_device


def open_session(
    path: str | os.PathLike[str],
    device: str = "cpu",
    precision: str | None = None,
    threads: int | None = None,
    input_size: tuple[int, int] | None = None,
    choices: Mapping[str, Any] | None = None,
    contexts: int | None = None,
) -> Session:
    """Open a model file with the backend that its suffix names.

    ``.onnx``: ONNX Runtime; ``.safetensors``: PyTorch; ``.engine``: TensorRT or TensorRT-RTX, as its manifest says.
    ``device`` is ``cpu``, ``cuda``, ``cuda:<index>``, or for ``.onnx`` files ``tensorrt`` or ``tensorrt:<index>``, ONNX
    Runtime's TensorRT provider (an engine always runs on a GPU). ``precision`` must be the file's own where that is
    fixed. ``threads`` bounds the CPU threads. ``contexts`` is how many batches of a stream are worked on at once: 2 by
    default for an engine, each with GPU memory of its own; 1 for ONNX Runtime on a CPU, where the threads are shared
    out, so that more images are done in a second and each takes longer; other backends need no such number. The rest
    is fixed in an exported file and therefore for PyTorch models only: ``input_size`` (height, width in pixels) and
    ``choices`` (values by name of what the family lets a checkpoint be deployed with, None for its own); the default of
    each is what an export would take.

    Raises FileNotFoundError for a missing file, ValueError for one that is damaged, unknown or not an asag model, and
    BackendUnavailableError where the backend cannot run on this machine.
    """
    path = Path(path)
    kind, device_index = check_device(device)
    if threads is not None and threads < 1:
        raise ValueError(f"the number of threads must be at least 1, it is {threads}")
    if contexts is not None and contexts < 1:
        raise ValueError(f"the number of contexts must be at least 1, it is {contexts}")
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        raise ValueError(f"unknown kind of model {path}: expected {', '.join(_OPENERS)}")
    if not path.exists():
        raise FileNotFoundError(f"model not found: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name a model file")
    if kind == "tensorrt" and path.suffix.lower() != ".onnx":
        raise ValueError(f"{path} does not run on the device tensorrt, which is for .onnx files; use cuda")
    chosen = {name: value for name, value in (choices or {}).items() if value is not None}
    fixed = [*(["input size"] if input_size else []), *(name.replace("_", " ") for name in chosen)]
    if fixed and path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path} has its {fixed[0]} fixed in the file; export the checkpoint again with your choice")
    session = opener(path, _Options(kind, device_index, threads, contexts, input_size, chosen))
    if precision is not None and session.precision != precision:
        session.close()
        raise ValueError(f"{path} is {session.precision}, not {precision}; export or build it with that precision")
    return session


@dataclasses.dataclass(frozen=True)
class _Options:
    """What :func:`open_session` hands to a backend."""

    device_kind: str
    device_index: int
    threads: int | None
    contexts: int | None
    input_size: tuple[int, int] | None
    choices: Mapping[str, Any]


def _open_onnxruntime(path: Path, options: _Options) -> Session:
    from asag.runtime.backends.onnxruntime_session import OnnxRuntimeSession

    return OnnxRuntimeSession(path, options.device_kind, options.device_index, options.threads, options.contexts or 1)


def _open_pytorch(path: Path, options: _Options) -> Session:
    from asag.runtime.backends.pytorch_session import open_pytorch

    return open_pytorch(
        path, options.device_kind, options.device_index, options.threads, options.input_size, options.choices
    )


def _open_engine(path: Path, options: _Options) -> Session:
    from asag.runtime.backends.engine_session import EngineSession

    return EngineSession(path, options.device_index, options.contexts or 2)


_OPENERS: dict[str, Callable[[Path, _Options], Session]] = {
    ".onnx": _open_onnxruntime,
    ".safetensors": _open_pytorch,
    ".engine": _open_engine,
}
