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
    the stage by itself: `batched`, all at once and kept for the gradients, or `one_by_one`, in turn and computed again
    for them, which is slower and takes the memory of `none`. The numbers are the same."""

    def __post_init__(self) -> None:
        if self.recollection not in RECOLLECTIONS:
            raise ValueError(f"recollection is {self.recollection!r}; choose one of {', '.join(RECOLLECTIONS)}")
