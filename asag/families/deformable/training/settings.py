"""What only this family's training has, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeformableSettings:
    """Fields of a training configuration beside those of every family."""
