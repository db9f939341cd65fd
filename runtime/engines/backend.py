"""The two builders of engines, TensorRT and TensorRT for RTX: how each is loaded, and for which GPUs it builds.

They share one API, so that building, running and inspecting an engine is written once and takes the module as a value.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from asag.runtime.errors import BackendUnavailableError, one_line

Capability = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class EngineBackend:
    """One builder and its runtime.

    ``title`` is the product's name in messages, ``module`` the Python module, ``install`` what a user runs where it is
    missing. ``op_lowering`` says what becomes of the ops of domain ``asag``: "plugins" (the kernels of `trt_plugins`
    inside the engine) or "inlined" (their bodies of standard operators). ``capabilities`` are the compute capabilities
    that engines run on, and ``portable`` tells whether one engine may serve several of them, without a GPU at build.
    """

    name: str
    title: str
    module: str
    install: str
    op_lowering: str
    capabilities: tuple[Capability, ...]
    portable: bool

    @property
    def targets(self) -> tuple[str, ...]:
        """The GPU architectures by name ("sm_86")."""
        return tuple(f"sm_{major}{minor}" for major, minor in self.capabilities)

    def load(self) -> Any:
        """The module; BackendUnavailableError with the way to install it when it is not there."""
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            reason = one_line(error, 120)
            raise BackendUnavailableError(f"{self.title} is not installed: {self.install} ({reason})") from None


TENSORRT = EngineBackend(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    install="install it as NVIDIA's documentation says, version 10.13 or later",
    op_lowering="plugins",
    capabilities=((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)),
    portable=False,
)
# Ampere, Ada, Blackwell RTX. It knows Turing (7.5) too, but has no float32 matrix product there, which the anchors'
# geometry needs in every precision.
TENSORRT_RTX = EngineBackend(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    module="tensorrt_rtx_bindings",
    install="pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
    op_lowering="inlined",
    capabilities=((8, 0), (8, 6), (8, 9), (12, 0), (12, 1)),
    portable=True,
)

BACKENDS = {backend.name: backend for backend in (TENSORRT, TENSORRT_RTX)}
"""By the name that manifests and the command use."""


def captured_logger(module: Any, listener: Callable[[str, str], None] | None = None) -> Any:
    """A logger that keeps errors and warnings instead of printing them.

    ``listener`` is called with the severity ("error", "verbose", ...) and text of every message, in order.
    """

    class CapturedLogger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if listener is not None:
                listener(severity.name.lower(), message)
            text = " ".join(message.split())
            if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(text)
            elif severity == module.ILogger.Severity.WARNING:
                self.warnings.append(text)

    return CapturedLogger()
