"""What each PTX instruction does to registers and memory; warp-wide ones are in `warp`."""

from __future__ import annotations

import numpy as np

from tests.ptx_machine.arithmetic import COMPARISONS, DTYPES, convert, function_of, pack_halves
from tests.ptx_machine.memory import GlobalMemory, Lanes, SharedMemory, Values
from tests.ptx_machine.program import Instruction
from tests.ptx_machine.registers import Registers, items
from tests.ptx_machine.warp import WARP_WIDE, Step

TURNS = ("bra", "ret", "bar")
"""Instructions that decide who runs next, which the machine itself handles."""


class Instructions:
    """Turns instructions into functions of the threads that run them."""

    def __init__(
        self, registers: Registers, memory: GlobalMemory, shared: SharedMemory, parameters: dict[str, bytes]
    ) -> None:
        self.registers, self.memory, self.shared, self.parameters = registers, memory, shared, parameters
        self.copies: list[tuple[Lanes, Values, list[Values]]] = []

    def decode(self, instruction: Instruction) -> Step | None:
        """The instruction's function, or None for one of :data:`TURNS`. Raises ValueError for an unknown one."""
        parts, operands = instruction.parts, instruction.operands
        name, kind = parts[0], parts[-1]
        special = {
            "ld": self._load,
            "st": self._store,
            "atom": self._atomic,
            "cp": self._copy,
            "setp": self._compare,
            "selp": self._select,
            "cvt": self._convert,
            "cvta": self._move_pointer,
        }
        if name in TURNS:
            return None
        if name in WARP_WIDE:
            return WARP_WIDE[name](self.registers, self.shared, parts, operands)
        if name in special:
            return special[name](parts, operands)
        if name == "mov" and "{" in "".join(operands):
            return self._pack(parts, operands)
        function = function_of(parts)
        if function is None:
            raise ValueError(f"unknown PTX instruction: {instruction.text}")
        kinds = [kind] * (len(operands) - 1)
        if name in ("shl", "shr"):
            kinds[1] = "u32"
        if name == "bfi":
            kinds[2:] = "u32", "u32"
        readers = [self.registers.reader(operand, each) for operand, each in zip(operands[1:], kinds, strict=True)]
        write = self.registers.writer(operands[0])
        return lambda lanes: write(lanes, function(*(read(lanes) for read in readers)))

    def _load(self, parts: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        dtype = DTYPES[parts[-1]]
        writers = [self.registers.writer(item) for item in items(operands[0])]
        if parts[1] == "param":
            value = np.frombuffer(self.parameters[operands[1][1:-1]], dtype)
            return lambda lanes: writers[0](lanes, value)
        address = self.registers.address(operands[1])
        size, count = dtype.itemsize, len(writers)

        def load(lanes: Lanes) -> None:
            if parts[1] == "global":
                found = self.memory.load(address(lanes), size, count, lanes)
            else:
                found = self.shared.load(address(lanes), size, count, lanes)
            for write, values in zip(writers, found, strict=True):
                write(lanes, values.view(dtype))

        if parts[1] not in ("global", "shared"):
            raise ValueError(f"unknown PTX memory: {'.'.join(parts)}")
        return load

    def _store(self, parts: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        bits = f"u{8 * DTYPES[parts[-1]].itemsize}"
        address = self.registers.address(operands[0])
        readers = [self.registers.reader(item, bits) for item in items(operands[1])]

        def store(lanes: Lanes) -> None:
            given = [np.broadcast_to(read(lanes), lanes.shape) for read in readers]
            if parts[1] == "global":
                self.memory.store(address(lanes), DTYPES[bits].itemsize, given, lanes)
            else:
                self.shared.store(address(lanes), DTYPES[bits].itemsize, given, lanes)

        if parts[1] not in ("global", "shared"):
            raise ValueError(f"unknown PTX memory: {'.'.join(parts)}")
        return store

    def _atomic(self, parts: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        if parts[1:] != ("shared", "add", "u32"):
            raise ValueError(f"unknown PTX instruction: {'.'.join(parts)}")
        write, address, read = (
            self.registers.writer(operands[0]),
            self.registers.address(operands[1]),
            self.registers.reader(operands[2], "u32"),
        )

        def add(lanes: Lanes) -> None:
            values = np.broadcast_to(read(lanes), lanes.shape)
            write(lanes, self.shared.add_atomically(address(lanes), values, lanes))

        return add

    def _copy(self, parts: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        """`cp.async`: until its thread waits for it, what is to be overwritten counts as not written."""
        if parts[2] == "wait_all":
            return self._finish_copies
        target, source = self.registers.address(operands[0]), self.registers.address(operands[1])
        assert parts[2:] == ("cg", "shared", "global"), parts
        assert operands[2] == "16"

        def start(lanes: Lanes) -> None:
            addresses = target(lanes)
            places = self.shared.places(addresses, 16, lanes, "an asynchronous copy")
            self.shared.note(places, 16, lanes, writes=True)
            for byte in range(16):
                self.shared.written[places + byte] = False
            self.copies.append((lanes, addresses, self.memory.load(source(lanes), 4, 4, lanes)))

        return start

    def _finish_copies(self, waiting: Lanes) -> None:
        pending, self.copies = self.copies, []
        for lanes, addresses, words in pending:
            done = np.isin(lanes, waiting)
            self.shared.store(addresses[done], 4, [values[done] for values in words], lanes[done])
            if not done.all():
                self.copies.append((lanes[~done], addresses[~done], [values[~done] for values in words]))

    def _compare(self, parts: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        compare, kind = COMPARISONS[parts[1]], parts[-1]
        write = self.registers.writer(operands[0])
        one, other = (self.registers.reader(operand, kind) for operand in operands[1:])
        return lambda lanes: write(lanes, compare(one(lanes), other(lanes)))

    def _select(self, parts: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        write = self.registers.writer(operands[0])
        one, other = (self.registers.reader(operand, parts[-1]) for operand in operands[1:3])
        chooser = self.registers.reader(operands[3], "pred")
        return lambda lanes: write(lanes, np.where(chooser(lanes), one(lanes), other(lanes)))

    def _convert(self, parts: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        write = self.registers.writer(operands[0])
        if parts[-2].endswith("x2"):
            upper, lower = (self.registers.reader(operand, parts[-1]) for operand in operands[1:])
            return lambda lanes: write(lanes, pack_halves(upper(lanes), lower(lanes), parts[-2]))
        to, read = DTYPES[parts[-2]], self.registers.reader(operands[1], parts[-1])
        return lambda lanes: write(lanes, convert(read(lanes), to, parts[1:-2]))

    def _pack(self, parts: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        """`mov` between one register and the parts of it in several, lowest first."""
        pieces = len(items(operands[0])) * len(items(operands[1]))
        part = f"u{8 * DTYPES[parts[-1]].itemsize // pieces}"
        writers = [self.registers.writer(item) for item in items(operands[0])]
        readers = [self.registers.reader(item, part if len(writers) == 1 else parts[-1]) for item in items(operands[1])]

        def pack(lanes: Lanes) -> None:
            values = np.stack([np.broadcast_to(read(lanes), lanes.shape) for read in readers], axis=-1)
            if len(writers) == 1:
                writers[0](lanes, values.view(DTYPES[parts[-1]]).reshape(-1))
                return
            for index, write in enumerate(writers):
                write(lanes, values.view(DTYPES[part])[:, index])

        return pack

    def _move_pointer(self, parts: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        # A pointer to global memory is the same number in every form.
        assert parts[1:3] == ("to", "global"), parts
        write, read = self.registers.writer(operands[0]), self.registers.reader(operands[1], "u64")
        return lambda lanes: write(lanes, read(lanes))
