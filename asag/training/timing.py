"""Where the time of a training step goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch

PARTS = ("data", "forward", "loss", "assignment", "backward", "update", "step")
"""Waiting for images; the detector; the losses; costs and assignment; gradients; clipping and the optimizer; and, where
no finer parts were measured, all after the images."""


class PartTimer:
    """Adds up seconds by part. A part inside another one is taken out of it, so the parts never overlap.

    A GPU works on while Python goes ahead: `synchronize` waits for it wherever a part begins or ends, which makes the
    numbers true and the steps slower. `enabled` False measures nothing.
    """

    def __init__(self, enabled: bool = True, synchronize: bool = False) -> None:
        self.enabled, self.synchronize = enabled, synchronize
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block's time as that part's."""
        if not self.enabled:
            yield
            return
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        if self.enabled:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """The seconds by part since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken

    def _switch(self) -> None:
        """Give the time since the last switch to the innermost part."""
        if self.synchronize and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._running:
            self.add(self._running[-1], now - self._since)
        self._since = now


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each part's share of all of them, 0..1, in the order of `PARTS`."""
    whole = sum(seconds.values())
    return {name: seconds[name] / whole for name in PARTS if name in seconds and whole > 0}
