"""Runs a kernel's PTX on the CPU: every thread of the grid is a column of numpy arrays.

The threads furthest behind go first, so that branches meet again; instructions of a whole warp wait for all its lanes,
barriers for all threads of the block. What hardware would leave undefined raises :class:`KernelFaultError`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from tests.ptx_machine.arithmetic import DTYPES
from tests.ptx_machine.instructions import TURNS, Instructions
from tests.ptx_machine.memory import GlobalMemory, KernelFaultError, Lanes, SharedMemory
from tests.ptx_machine.program import Instruction, Program
from tests.ptx_machine.registers import Registers
from tests.ptx_machine.warp import WARP_WIDE, Step
from tests.ptx_machine.work import WARP

RUNNING, IN_WARP, AT_BARRIER, DONE = range(4)


class Machine:
    """One launch of a kernel."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        threads: int,
        memory: GlobalMemory,
        backwards: bool = False,
    ) -> None:
        """The threads of a block lie along x; backwards: its warps run one after another, the last one first."""
        if threads % WARP or threads > program.most_threads or max(grid[1:]) > 65535:
            raise KernelFaultError(f"{program.name} cannot be launched with {threads} threads on a grid of {grid}")
        self.program, self.threads, self.backwards = program, threads, backwards
        blocks = int(np.prod(grid))
        self.registers = Registers(program, grid, threads)
        self.memory, self.shared = memory, SharedMemory(program.shared, blocks, threads, memory.work, backwards)
        self.place = np.zeros(blocks * threads, np.int64)
        self.state = np.full(blocks * threads, RUNNING)

    def run(self, arguments: Any) -> None:
        """Run to the end; `arguments` is what cuLaunchKernel gets, an array of pointers to the arguments' values."""
        if [ctypes.sizeof(value) for value in arguments.values] != [
            DTYPES[kind].itemsize for kind in self.program.parameters.values()
        ]:
            raise KernelFaultError(f"{self.program.name} takes {self.program.parameters}, not {arguments.values}")
        parameters = {
            name: ctypes.string_at(pointer, ctypes.sizeof(value))
            for name, value, pointer in zip(self.program.parameters, arguments.values, arguments, strict=True)
        }
        instructions = Instructions(self.registers, self.memory, self.shared, parameters)
        steps = [instructions.decode(instruction) for instruction in self.program.instructions]
        with np.errstate(all="ignore"):
            while not (self.state == DONE).all():
                self._advance(steps)

    def _advance(self, steps: list[Step | None]) -> None:
        """Run the threads furthest behind up to the next branch, meeting or barrier."""
        running = np.flatnonzero(self.state == RUNNING)
        if not len(running):
            self._pass_barriers()
            return
        if self.backwards:
            warps = running % self.threads // WARP
            running = running[warps == warps.max()]
        places = self.place[running]
        first = int(places.min())
        lanes = running[places == first]
        ahead = places[places > first]
        stop = int(ahead.min()) if len(ahead) else len(steps)
        place = first
        while place < stop:
            instruction = self.program.instructions[place]
            name = instruction.parts[0]
            if name in TURNS:
                self._turn(instruction, place, lanes)
                return
            if name in WARP_WIDE:
                lanes = self._gather_warps(place, lanes, instruction)
                if not len(lanes):
                    return
            step = steps[place]
            assert step is not None
            chosen = self._guarded(instruction, lanes)
            if self.memory.work is not None:
                self.memory.work.count_instruction(name, lanes)
            try:
                if len(chosen):
                    step(chosen)
            except KernelFaultError as fault:
                raise KernelFaultError(f"{fault}: {instruction.text}") from None
            place += 1
        self.place[lanes] = place

    def _guarded(self, instruction: Instruction, lanes: Lanes) -> Lanes:
        if instruction.guard is None:
            return lanes
        name, wanted = instruction.guard
        return lanes[self.registers.rows[name][lanes] == wanted]

    def _turn(self, instruction: Instruction, place: int, lanes: Lanes) -> None:
        """A branch, an end or a barrier."""
        chosen = self._guarded(instruction, lanes)
        if self.memory.work is not None:
            self.memory.work.count_instruction(instruction.parts[0], lanes)
        self.place[lanes] = place + 1
        if instruction.parts[0] == "bra":
            self.place[chosen] = self.program.labels[instruction.operands[0]]
        elif instruction.parts[0] == "ret":
            self.state[chosen] = DONE
        else:
            if instruction.operands != ("0",) or instruction.guard is not None:
                raise KernelFaultError(f"a barrier of another kind than __syncthreads(): {instruction.text}")
            self.state[chosen] = AT_BARRIER

    def _pass_barriers(self) -> None:
        """Let blocks go on whose threads all wait at one barrier; there must be one, since nobody runs."""
        waiting = (self.state == AT_BARRIER).reshape(-1, self.threads)
        places = self.place.reshape(-1, self.threads)
        free = waiting.all(axis=1) & (places == places[:, :1]).all(axis=1)
        if not free.any():
            block = int(np.flatnonzero((self.state != DONE).reshape(-1, self.threads).any(axis=1))[0])
            states = np.bincount(self.state.reshape(-1, self.threads)[block], minlength=4)
            raise KernelFaultError(
                f"block {block} waits for ever: {states[AT_BARRIER]} threads at a barrier, {states[IN_WARP]} at an "
                f"instruction of the whole warp, {states[DONE]} at the end"
            )
        self.state.reshape(-1, self.threads)[free] = RUNNING
        self.shared.barriers[free] += 1

    def _gather_warps(self, place: int, lanes: Lanes, instruction: Instruction) -> Lanes:
        """Lanes of whole warps at this instruction; the others wait here."""
        if instruction.guard is not None:
            raise KernelFaultError(f"a guarded instruction of the whole warp: {instruction.text}")
        self.state[lanes] = IN_WARP
        self.place[lanes] = place
        here = ((self.state == IN_WARP) & (self.place == place)).reshape(-1, WARP)
        whole = np.flatnonzero(here.all(axis=1))
        lanes = (whole[:, None] * WARP + np.arange(WARP)).reshape(-1)
        self.state[lanes] = RUNNING
        return lanes
