"""Settings that several families' trainings have. Imports no PyTorch."""

from __future__ import annotations

RECOLLECTIONS = ("none", "one_by_one", "batched")
"""Which queries a stage trains on (:mod:`asag.training.recollection`). `none`: those of the stage before. The others
recollect, each copy through the stage in turn, with the least memory at a time, or all at once; the same numbers.
"""


def check_recollection(name: str) -> None:
    """Raise ValueError unless there is such a recollection."""
    if name not in RECOLLECTIONS:
        raise ValueError(f"recollection is {name!r}; choose one of {', '.join(RECOLLECTIONS)}")
