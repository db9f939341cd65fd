"""PTX instructions that a whole warp runs together; their lanes come as whole warps, one after another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx_machine.memory import KernelFaultError, Lanes, SharedMemory, Values
from tests.ptx_machine.registers import Registers, items
from tests.ptx_machine.work import WARP

Parts = tuple[str, ...]
Step = Callable[[Lanes], None]


def _shuffle(registers: Registers, shared: SharedMemory, parts: Parts, operands: Parts) -> Step:
    """`shfl.bfly`: the value of the lane whose number differs in the bits of the distance."""
    assert parts[1:] == ("sync", "bfly", "b32"), parts
    write = registers.writer(operands[0].split("|")[0])
    read, distance, bounds = (registers.reader(operand, "u32") for operand in operands[1:4])
    whole = _whole_warp(registers, operands[4])

    def shuffle(lanes: Lanes) -> None:
        whole(lanes)
        assert (bounds(lanes) == WARP - 1).all(), "a shuffle of parts of the warp"
        partners = np.arange(len(lanes)) ^ distance(lanes)
        write(lanes, np.broadcast_to(read(lanes), lanes.shape)[partners])

    return shuffle


def _vote(registers: Registers, shared: SharedMemory, parts: Parts, operands: Parts) -> Step:
    """`vote.ballot`: bit i is lane i's predicate."""
    assert parts[1:] == ("sync", "ballot", "b32"), parts
    write, read = registers.writer(operands[0]), registers.reader(operands[1], "pred")
    whole = _whole_warp(registers, operands[2])
    bits = np.uint32(1) << np.arange(WARP, dtype=np.uint32)

    def vote(lanes: Lanes) -> None:
        whole(lanes)
        flags = np.broadcast_to(read(lanes), lanes.shape).reshape(-1, WARP)
        write(lanes, np.repeat((flags * bits).sum(axis=1, dtype=np.uint32), WARP))

    return vote


def _reduce(registers: Registers, shared: SharedMemory, parts: Parts, operands: Parts) -> Step:
    """`redux`: the largest value of the warp, or the sum."""
    combine = {"max": np.max, "add": np.sum}[parts[2]]
    write, read = registers.writer(operands[0]), registers.reader(operands[1], parts[3])
    whole = _whole_warp(registers, operands[2])

    def reduce(lanes: Lanes) -> None:
        whole(lanes)
        values = np.broadcast_to(read(lanes), lanes.shape).reshape(-1, WARP)
        write(lanes, np.repeat(combine(values, axis=1).astype(values.dtype), WARP))

    return reduce


def _meet(registers: Registers, shared: SharedMemory, parts: Parts, operands: Parts) -> Step:
    """`bar.warp`, which orders the warp's accesses to shared memory."""
    assert parts[1:] == ("sync",), parts
    whole = _whole_warp(registers, operands[0])

    def meet(lanes: Lanes) -> None:
        whole(lanes)
        shared.meetings[lanes[::WARP] // WARP] += 1

    return meet


def _whole_warp(registers: Registers, mask: str) -> Step:
    """Check that a mask names every lane, which is all that this machine knows."""
    read = registers.reader(mask, "u32")

    def check(lanes: Lanes) -> None:
        if (read(lanes) != 0xFFFFFFFF).any():
            raise KernelFaultError("an instruction of a part of the warp")

    return check


def _load_tiles(registers: Registers, shared: SharedMemory, parts: Parts, operands: Parts) -> Step:
    """`ldmatrix`: lane i names row i%8 of tile i/8; a lane gets two neighbours of row (or column) lane/4."""
    writers, address = [registers.writer(item) for item in items(operands[0])], registers.address(operands[1])
    tiles, transposed = len(writers), "trans" in parts
    assert parts[1:4] == ("sync", "aligned", "m8n8"), parts

    def load(lanes: Lanes) -> None:
        named = lanes.reshape(-1, WARP)[:, : 8 * tiles].reshape(-1)
        addresses = address(lanes).reshape(-1, WARP)[:, : 8 * tiles].reshape(-1)
        words = shared.load(addresses, 4, 4, named)
        halves = np.stack(words, axis=-1).view(np.uint16).reshape(-1, tiles, 8, 8)
        if transposed:
            halves = halves.swapaxes(2, 3)
        pairs = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, tiles, WARP)
        for tile, write in enumerate(writers):
            write(lanes, pairs[:, tile].reshape(-1))

    return load


def _multiply_tiles(registers: Registers, shared: SharedMemory, parts: Parts, operands: Parts) -> Step:
    """`mma.m16n8k16` with float32 sums; fragments as in the PTX manual's figures for .f16 and .bf16."""
    assert parts[1:6] == ("sync", "aligned", "m16n8k16", "row", "col"), parts
    assert parts[6] == parts[9] == "f32", parts
    assert parts[7] == parts[8], parts
    writers = [registers.writer(item) for item in items(operands[0])]
    left, right = ([registers.reader(item, "u32") for item in items(operand)] for operand in operands[1:3])
    sums = [registers.reader(item, "f32") for item in items(operands[3])]

    def floats(bits: Values) -> Values:
        """[warps, 32 lanes] of pairs to [warps, 8, 4, 2]: lane/4, lane%4, item."""
        halves = np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 8, 4, 2)
        if parts[7] == "bf16":
            return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return halves.view(np.float16).astype(np.float32)

    def multiply(lanes: Lanes) -> None:
        a = [floats(read(lanes).reshape(-1, WARP)) for read in left]
        b = [floats(read(lanes).reshape(-1, WARP)) for read in right]
        rows = [np.concatenate((a[half], a[half + 2]), axis=2).reshape(-1, 8, 16) for half in range(2)]
        columns = np.concatenate((b[0], b[1]), axis=2).reshape(-1, 8, 16)
        product = np.concatenate(rows, axis=1) @ columns.swapaxes(1, 2)  # [warps, 16, 8]
        parted = product.reshape(-1, 2, 8, 4, 2)  # row half, lane/4, lane%4, item
        for index, (write, read) in enumerate(zip(writers, sums, strict=True)):
            own = np.ascontiguousarray(parted[:, index // 2, :, :, index % 2]).reshape(-1)
            write(lanes, read(lanes) + own)

    return multiply


WARP_WIDE: dict[str, Callable[[Registers, SharedMemory, Parts, Parts], Step]] = {
    "barwarp": _meet,
    "shfl": _shuffle,
    "vote": _vote,
    "redux": _reduce,
    "ldmatrix": _load_tiles,
    "mma": _multiply_tiles,
}
