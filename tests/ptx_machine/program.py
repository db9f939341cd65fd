"""PTX text as a list of instructions, as NVRTC writes it for one kernel without functions or local memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

GAP = 64
"""Bytes between two shared variables that nothing may touch."""

_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)([^{]*)\{(.*)\}\s*$", re.DOTALL)
_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+)\s+(?:\.ptr[^,]*? )?(\w+)\s*(?:,|$)")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%\w+)<(\d+)>")
_SHARED = re.compile(r"\.shared \.align (\d+) \.[a-z](\d+) (\w+)(?:\[(\d+)\])?")
_UNUSED_HALF = re.compile(r"\{ \.reg \.b16 tmp; mov\.b32 \{tmp, ([^;]*;) \}")
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


@dataclass(frozen=True)
class Instruction:
    """One instruction; `add.f32 %f3, %f1, %f2` has the parts add and f32 and three operands."""

    parts: tuple[str, ...]
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None
    """A predicate's name and the value with which the instruction runs."""
    text: str


@dataclass(frozen=True)
class Program:
    """A kernel."""

    name: str
    parameters: dict[str, str]
    """Types by name, in order."""
    most_threads: int
    registers: dict[str, tuple[str, int]]
    """Type and number by prefix."""
    shared: dict[str, tuple[int, int]]
    """Address and size of each shared variable, with gaps between them."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(text: str) -> Program:
    """The kernel of a PTX module. Raises ValueError for what this reader does not know."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text.rstrip("\0"), flags=re.DOTALL)
    text = _UNUSED_HALF.sub(r"mov.b32 {_, \1", text)
    entry = _ENTRY.search(text)
    if entry is None:
        raise ValueError("this PTX has no single kernel")
    name, parameters, directives, body = entry.groups()
    limit = re.search(r"\.maxntid (\d+), 1, 1", directives)
    registers: dict[str, tuple[str, int]] = {}
    shared: dict[str, tuple[int, int]] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    address = GAP
    for part in body.split(";"):
        *before, rest = re.split(r"(\$\w+):", part)
        labels |= dict.fromkeys(before[1::2], len(instructions))
        statement = " ".join(rest.split())
        if not statement or statement.startswith(".pragma"):
            continue
        if found := _REGISTERS.fullmatch(statement):
            registers[found[2]] = found[1], int(found[3])
        elif found := _SHARED.fullmatch(statement):
            alignment, size = int(found[1]), int(found[2]) // 8 * int(found[4] or 1)
            address = -(-address // alignment) * alignment
            shared[found[3]] = address, size
            address += size + GAP
        elif (found := _INSTRUCTION.fullmatch(statement)) and not statement.startswith("."):
            guard = (found[2], found[1] != "!") if found[2] else None
            parts, operands = tuple(found[3].split(".")), tuple(_OPERAND.findall(found[4]))
            if parts[:2] == ("bar", "warp"):  # an instruction of the warp, not a barrier of the block
                parts = ("barwarp", *parts[2:])
            instructions.append(Instruction(parts, operands, guard, statement))
        else:
            raise ValueError(f"unknown PTX statement: {statement}")
    kinds = {name: kind for kind, name in _PARAMETER.findall(parameters.strip())}
    return Program(name, kinds, int(limit[1]) if limit else 1024, registers, shared, tuple(instructions), labels)
