"""What only AdaMixer's training has, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass

from asag.training.settings import check_recollection


@dataclass(frozen=True)
class AdaMixerSettings:
    """Fields of a training configuration beside those of every family."""

    recollection: str = "none"
    """Which earlier queries a decoder stage trains on, see :data:`asag.training.settings.RECOLLECTIONS`."""

    def __post_init__(self) -> None:
        check_recollection(self.recollection)
