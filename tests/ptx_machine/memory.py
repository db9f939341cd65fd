"""Memory that knows what a kernel may do with it: bounds, alignment, what was written, and who races with whom."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.ptx_machine.work import WARP, Values, Work

Lanes = NDArray[np.intp]

BASE = 0x7F12_0000_0000
GUARD = 256
NOBODY, SEVERAL, ATOMICALLY = -1, -2, -3
"""In place of a thread's number, or a warp's."""

GRANULE = 2
"""Bytes that are told apart when looking for races."""


class KernelFaultError(AssertionError):
    """The kernel did what it must not do."""


def _items(memory: NDArray[np.uint8], places: Values, size: int) -> Values:
    return memory.view(f"u{size}")[places // size]


class GlobalMemory:
    """Arrays on the pretended device, 256 bytes apart. Inputs are read only, each output byte is written once."""

    def __init__(self, inputs: list[Values], outputs: list[int], work: Work | None = None) -> None:
        """inputs: contents; outputs: sizes in bytes; work: where accesses are counted."""
        self.work = work
        sizes = [array.nbytes for array in inputs] + outputs
        starts, end = [], GUARD
        for size in sizes:
            starts.append(end)
            end = -(-(end + size + GUARD) // GUARD) * GUARD
        self.bytes = np.full(end, 0xA5, np.uint8)
        self.readable, self.writable, self.written = (np.zeros(end, bool) for _ in range(3))
        for start, array in zip(starts, inputs, strict=False):
            self.bytes[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
            self.readable[start : start + array.nbytes] = True
        self.outputs = [slice(start, start + size) for start, size in zip(starts[len(inputs) :], outputs, strict=True)]
        for part in self.outputs:
            self.writable[part] = True
        self.pointers = [BASE + start for start in starts]

    def _places(self, addresses: Values, size: int, lanes: Lanes, allowed: NDArray[np.bool_], what: str) -> Values:
        if (addresses % np.uint64(size)).any():
            raise KernelFaultError(f"{what} of {size} bytes at an address that is no multiple of {size}")
        places = (addresses - np.uint64(BASE)).view(np.int64)
        if ((places < 0) | (places + size > len(self.bytes))).any() or not (
            allowed[places].all() and allowed[places + size - 1].all()
        ):
            raise KernelFaultError(f"{what} of {size} bytes where the kernel may not")
        if self.work is not None:
            self.work.count_global(addresses, size, lanes)
        return places

    def load(self, addresses: Values, size: int, count: int, lanes: Lanes) -> list[Values]:
        """`count` items of `size` bytes per thread."""
        places = self._places(addresses, size * count, lanes, self.readable, "a load from global memory")
        return [_items(self.bytes, places + size * index, size) for index in range(count)]

    def store(self, addresses: Values, size: int, items: list[Values], lanes: Lanes) -> None:
        places = self._places(addresses, size * len(items), lanes, self.writable, "a store to global memory")
        every = (places[:, None] + np.arange(size * len(items))).reshape(-1)
        if self.written[every].any() or len(np.unique(every)) != len(every):
            raise KernelFaultError("a byte of an output is written twice")
        self.written[every] = True
        for index, values in enumerate(items):
            self.bytes.view(f"u{size}")[(places + size * index) // size] = values

    def output(self, index: int) -> NDArray[np.uint8]:
        """An output's bytes. Raises KernelFaultError where some were never written."""
        part = self.outputs[index]
        if not self.written[part].all():
            raise KernelFaultError(f"output {index} has bytes that no thread wrote")
        return self.bytes[part].copy()


class SharedMemory:
    """The shared memory of all blocks, with the order of accesses that barriers give."""

    def __init__(
        self,
        variables: dict[str, tuple[int, int]],
        blocks: int,
        threads: int,
        work: Work | None,
        backwards: bool,
    ) -> None:
        self.work, self.backwards = work, backwards
        size = max((address + length for address, length in variables.values()), default=0)
        self.pitch = -(-size // 64) * 64 + 64
        self.threads = threads
        self.bytes = np.zeros(blocks * self.pitch, np.uint8)
        self.written = np.zeros(blocks * self.pitch, bool)
        inside = np.zeros(self.pitch, bool)
        for address, length in variables.values():
            inside[address : address + length] = True
        self.inside = np.tile(inside, blocks)
        granules = len(self.bytes) // GRANULE
        # By granule: the thread that wrote last, the threads that read since, their warp, and how many barriers of the
        # block and of the warp they had passed.
        self.write = np.full((4, granules), NOBODY, np.int64)
        self.read = np.full((4, granules), NOBODY, np.int64)
        self.barriers = np.zeros(blocks, np.int64)
        self.meetings = np.zeros(blocks * threads // WARP, np.int64)

    def places(self, addresses: Values, size: int, lanes: Lanes, what: str) -> Values:
        """Indices of the first bytes, checked."""
        at = addresses.astype(np.int64)
        if (at % size).any():
            raise KernelFaultError(f"{what} of {size} bytes at an address that is no multiple of {size}")
        if ((at < 0) | (at + size > self.pitch)).any():
            raise KernelFaultError(f"{what} outside shared memory")
        at = at + lanes // self.threads * self.pitch
        if not (self.inside[at].all() and self.inside[at + size - 1].all()):
            raise KernelFaultError(f"{what} outside every shared variable")
        if self.work is not None:
            self.work.count_shared(addresses, size, lanes)
        return at

    def load(self, addresses: Values, size: int, count: int, lanes: Lanes) -> list[Values]:
        places = self.places(addresses, size * count, lanes, "a load from shared memory")
        if not all(self.written[places + byte].all() for byte in range(size * count)):
            raise KernelFaultError("shared memory is read before it is written")
        self.note(places, size * count, lanes, writes=False)
        return [_items(self.bytes, places + size * index, size) for index in range(count)]

    def store(self, addresses: Values, size: int, items: list[Values], lanes: Lanes) -> None:
        places = self.places(addresses, size * len(items), lanes, "a store to shared memory")
        self.note(places, size * len(items), lanes, writes=True)
        for index, values in enumerate(items):
            self.bytes.view(f"u{size}")[(places + size * index) // size] = values
        for byte in range(size * len(items)):
            self.written[places + byte] = True

    def add_atomically(self, addresses: Values, values: Values, lanes: Lanes) -> Values:
        """32-bit sums in the order of the lanes, or backwards; what was there before each."""
        places = self.places(addresses, 4, lanes, "an atomic operation on shared memory")
        if not all(self.written[places + byte].all() for byte in range(4)):
            raise KernelFaultError("shared memory is added to before it is written")
        self.note(places, 4, lanes, writes=True, atomic=True)
        before, memory = np.empty_like(values), self.bytes.view("u4")
        order = range(len(places))
        for index in reversed(order) if self.backwards else order:
            place = places[index] // 4
            before[index] = memory[place]
            memory[place] += values[index]
        return before

    def note(self, places: Values, size: int, lanes: Lanes, writes: bool, atomic: bool = False) -> None:
        """Remember an access. Raises KernelFaultError where no barrier orders it after another thread's access.

        Not even threads of one warp are in order without a barrier.
        """
        steps = -(-size // GRANULE)
        granules = (places[:, None] // GRANULE + np.arange(steps)).reshape(-1)
        threads = np.repeat(lanes, steps)
        warps = threads // WARP
        now = np.stack((threads, warps, self.barriers[threads // self.threads], self.meetings[warps]))

        def is_over(log: Values) -> Values:
            """Where a barrier lies between."""
            thread, warp, barrier, meeting = log
            return (thread == NOBODY) | (barrier != now[2]) | ((warp == warps) & (meeting != now[3]))

        for log in [self.write, self.read] if writes else [self.write]:
            thread = log[0, granules]
            ordered = is_over(log[:, granules]) | (thread == threads)
            if atomic:
                ordered |= thread == ATOMICALLY
            if not ordered.all():
                raise KernelFaultError(
                    f"a race: thread {threads[~ordered][0]} {'writes' if writes else 'reads'} shared memory that "
                    f"another {'wrote' if log is self.write else 'read'} since the last barrier"
                )
        if writes:
            self.write[:, granules] = now
            if atomic:
                self.write[0, granules] = ATOMICALLY
            elif (self.write[0, granules] != threads).any():
                raise KernelFaultError("a race: two threads write the same shared memory at once")
            return
        known = self.read[:, granules]
        self.read[:, granules] = np.where(is_over(known), now, known)
        for row in range(2):
            self.read[row, granules[self.read[row, granules] != now[row]]] = SEVERAL
