"""What only SAP-DETR's training has, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SAPDETRSettings:
    """Nothing beside what every family's has."""
