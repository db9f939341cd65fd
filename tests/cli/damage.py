"""Damaging files in the ways that transfers, full disks and careless hands do, reproducibly."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

Damage = Callable[[bytes, np.random.Generator], bytes]

ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1.5, float("inf"), "", "x", "\u0000", [], [[]], {}, {"a": 1}, [1, 2, 3], "9" * 5000,
)  # fmt: skip


def cut(content: bytes, generator: np.random.Generator) -> bytes:
    return content[: generator.integers(0, len(content))]


def flip_bits(content: bytes, generator: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for place in generator.integers(0, len(content), generator.integers(1, 9)):
        changed[place] ^= 1 << int(generator.integers(0, 8))
    return bytes(changed)


def flip_early_bits(content: bytes, generator: np.random.Generator) -> bytes:
    """Headers and tables of contents come first and are easily missed."""
    head = min(len(content), 256)
    return flip_bits(content[:head], generator) + content[head:]


def zero_block(content: bytes, generator: np.random.Generator) -> bytes:
    start, stop = sorted(generator.integers(0, len(content) + 1, 2))
    return content[:start] + bytes(stop - start) + content[stop:]


def scramble_block(content: bytes, generator: np.random.Generator) -> bytes:
    start = int(generator.integers(0, len(content)))
    block = generator.bytes(int(generator.integers(1, 64)))
    return content[:start] + block + content[start + len(block) :]


def remove_block(content: bytes, generator: np.random.Generator) -> bytes:
    start, stop = sorted(generator.integers(0, len(content) + 1, 2))
    return content[:start] + content[stop:]


def repeat_block(content: bytes, generator: np.random.Generator) -> bytes:
    start, stop = sorted(generator.integers(0, len(content) + 1, 2))
    return content[:stop] + content[start:]


def replace_all(content: bytes, generator: np.random.Generator) -> bytes:
    return generator.bytes(int(generator.integers(0, 300)))


DAMAGES: tuple[Damage, ...] = (
    cut, flip_bits, flip_bits, flip_early_bits, zero_block, scramble_block, remove_block, repeat_block, replace_all,
)  # fmt: skip


def damage(content: bytes, generator: np.random.Generator) -> bytes:
    """``content`` with one kind of damage."""
    return DAMAGES[generator.integers(0, len(DAMAGES))](content, generator)


def damage_json(content: bytes, generator: np.random.Generator) -> bytes:
    """Well-formed JSON with a value somewhere that does not belong there, or bytes damaged as in any file."""
    if generator.random() < 0.3:
        return damage(content, generator)
    values = json.loads(content)
    place, key = values, _key(values, generator)
    while isinstance(place[key], dict | list) and place[key] and generator.random() < 0.7:
        place = place[key]
        key = _key(place, generator)
    place[key] = ODD_VALUES[generator.integers(0, len(ODD_VALUES))]
    return json.dumps(values).encode()


def _key(values: Any, generator: np.random.Generator) -> Any:
    number = int(generator.integers(0, len(values)))
    return list(values)[number] if isinstance(values, dict) else number
