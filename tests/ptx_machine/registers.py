"""The registers of all threads, and the operands that name them."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.ptx_machine.arithmetic import DTYPES
from tests.ptx_machine.memory import Lanes, Values
from tests.ptx_machine.program import Program

Read = Callable[[Lanes], Values]
Write = Callable[[Lanes, Values], None]


class Registers:
    """One row per register, one column per thread of the grid."""

    def __init__(self, program: Program, grid: tuple[int, int, int], threads: int) -> None:
        lanes = np.arange(int(np.prod(grid)) * threads)
        self.shared = program.shared
        self.rows: dict[str, Values] = {}
        for prefix, (kind, count) in program.registers.items():
            dtype = np.dtype(bool) if kind == "pred" else np.dtype(f"u{DTYPES[kind].itemsize}")
            rows = np.zeros((count, len(lanes)), dtype)
            self.rows |= {f"{prefix}{index}": row for index, row in enumerate(rows)}
        block = lanes // threads
        places = {"x": block % grid[0], "y": block // grid[0] % grid[1], "z": block // grid[0] // grid[1]}
        self.rows |= {f"%ctaid.{axis}": place.astype(np.uint32) for axis, place in places.items()}
        self.rows["%tid.x"] = (lanes % threads).astype(np.uint32)

    def reader(self, operand: str, kind: str) -> Read:
        """Reads an operand as `kind`; a wider register is cut."""
        dtype = DTYPES[kind]
        if operand in self.rows:
            row = self.rows[operand]
            if row.dtype.itemsize == dtype.itemsize:
                return lambda lanes: row[lanes].view(dtype)
            return lambda lanes: row[lanes].astype(f"u{dtype.itemsize}").view(dtype)
        if operand in self.shared:
            value = np.full(1, self.shared[operand][0]).astype(dtype)
        elif float_bits := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            value = np.array([int(float_bits[1], 16)], np.uint32).view(dtype)
        elif kind == "pred":
            value = np.array([int(operand) != 0])
        else:
            bits = int(operand, 0) % (1 << 8 * dtype.itemsize)
            value = np.array([bits], f"u{dtype.itemsize}").view(dtype)
        return lambda lanes: value

    def writer(self, operand: str) -> Write:
        """Writes a register; a narrower value is extended by zeros or its sign."""
        if operand == "_":
            return lambda lanes, values: None
        row = self.rows[operand]
        bits = row.dtype

        def write(lanes: Lanes, values: Values) -> None:
            if values.dtype.itemsize != bits.itemsize:
                values = values.astype(f"{'i' if values.dtype.kind == 'i' else 'u'}{bits.itemsize}")
            row[lanes] = values if bits == np.dtype(bool) else values.view(bits)

        return write

    def address(self, operand: str) -> Read:
        """Reads `[register+offset]`, one address per thread."""
        base, _, offset = operand[1:-1].partition("+")
        kind = "u64" if base.startswith("%rd") else "u32"
        read, step = self.reader(base, kind), DTYPES[kind].type(int(offset or "0") % (1 << 8 * DTYPES[kind].itemsize))
        return lambda lanes: np.broadcast_to(read(lanes) + step, lanes.shape)


def items(operand: str) -> list[str]:
    """The names in a vector operand, or the one name."""
    return operand.strip("{}").replace(" ", "").split(",")
