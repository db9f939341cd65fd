"""Settings that several families' trainings have. Imports no PyTorch."""

from __future__ import annotations

RECOLLECTIONS = ("none", "one_by_one", "batched")
"""Which queries a stage trains on (:mod:`asag.training.recollection`). `none`: those of the stage before. The others
recollect: `batched`, all copies through the stage at once and kept for the gradients, or `one_by_one`, in turn and
computed again for them, which is slower and takes the memory of `none`. The numbers are the same.
"""


def check_recollection(name: str) -> None:
    """Raise ValueError unless there is such a recollection."""
    if name not in RECOLLECTIONS:
        raise ValueError(f"recollection is {name!r}; choose one of {', '.join(RECOLLECTIONS)}")
