"""From artifacts to detections: sessions, image processing, evaluation, parity, benchmark and reports.

Importing this package imports no backend and never PyTorch; names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asag.runtime.errors import BackendUnavailableError
    from asag.runtime.metadata import ModelMetadata
    from asag.runtime.opening import open_session
    from asag.runtime.postprocessing import Detections
    from asag.runtime.session import Session

_HOMES = {
    "BackendUnavailableError": "asag.runtime.errors",
    "Detections": "asag.runtime.postprocessing",
    "ModelMetadata": "asag.runtime.metadata",
    "Session": "asag.runtime.session",
    "open_session": "asag.runtime.opening",
}

__all__ = ["BackendUnavailableError", "Detections", "ModelMetadata", "Session", "open_session"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
