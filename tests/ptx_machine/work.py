"""Counts what a kernel makes a GPU do: instructions per warp, memory sectors, passes through shared memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]

WARP = 32
SECTOR = 32
"""Bytes that global memory moves at least."""
BANKS = 32
"""Words of four bytes that shared memory serves in one pass, all in different banks."""


@dataclass
class Work:
    """Sums over all warps of a launch."""

    instructions: Counter[str] = field(default_factory=Counter)
    """PTX instructions by name; a warp whose lanes part counts more than once."""
    sectors: int = 0
    """Sectors of global memory that were asked for, caches aside."""
    fewest_sectors: int = 0
    """The same if every warp's bytes lay side by side."""
    passes: int = 0
    """Passes through shared memory."""
    fewest_passes: int = 0
    """The same without bank conflicts."""

    def count_instruction(self, name: str, lanes: Values) -> None:
        """One instruction of the warps of `lanes`, which are in rising order."""
        warps = lanes // WARP
        self.instructions[name] += 1 + int(np.count_nonzero(warps[1:] != warps[:-1]))

    def count_global(self, addresses: Values, size: int, lanes: Values) -> None:
        """An access of `size` bytes per thread."""
        warps, first = lanes // WARP, addresses.astype(np.int64) // SECTOR
        self.sectors += _count_pairs(warps, first)
        distinct = np.unique(np.stack((warps, addresses.astype(np.int64))), axis=1)[0]
        _, numbers = np.unique(distinct, return_counts=True)
        self.fewest_sectors += int((-(-numbers * size // SECTOR)).sum())

    def count_shared(self, addresses: Values, size: int, lanes: Values) -> None:
        """An access of `size` bytes per thread; 8 bytes go by half warps, 16 by quarters."""
        words = max(1, size // 4)
        group = lanes // WARP * words + lanes % WARP * words // WARP
        every = (addresses.astype(np.int64) // 4)[:, None] + np.arange(words)
        pairs = np.unique(np.stack((np.repeat(group, words), every.reshape(-1))), axis=1)
        banks, busy = np.unique(pairs[0] * BANKS + pairs[1] % BANKS, return_counts=True)
        groups, place = np.unique(banks // BANKS, return_inverse=True)
        most = np.zeros(len(groups), np.int64)
        np.maximum.at(most, place, busy)
        self.passes += int(most.sum())
        self.fewest_passes += len(groups)


def _count_pairs(ones: Values, others: Values) -> int:
    return np.unique(np.stack((ones, others)), axis=1).shape[1]
