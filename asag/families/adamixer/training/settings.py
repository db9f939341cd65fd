"""What only AdaMixer's training has, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass

RECOLLECTIONS = ("none", "one_by_one", "batched")


@dataclass(frozen=True)
class AdaMixerSettings:
    """Fields of a training configuration beside those of every family."""

    recollection: str = "none"
    """Which earlier queries a decoder stage trains on. `none`: those of the stage before it. The others add what the
    stage before that one made (selective query recollection, section 4.2 of its paper), each set of queries through
    the stage by itself: `one_by_one`, with the least memory at a time, or `batched`, all at once; the same numbers."""

    def __post_init__(self) -> None:
        if self.recollection not in RECOLLECTIONS:
            raise ValueError(f"recollection is {self.recollection!r}; choose one of {', '.join(RECOLLECTIONS)}")
