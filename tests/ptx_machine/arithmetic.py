"""What PTX's arithmetic instructions compute, on numpy arrays with one item per thread.

Meanings follow NVIDIA's "Parallel Thread Execution ISA". Differences from hardware: `fma` rounds by way of float64,
which changes a last bit now and then, and `ex2.approx` is as exact as float32 allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx_machine.work import Values

DTYPES: dict[str, Any] = {
    **{f"{letter}{8 * size}": np.dtype(f"u{size}") for letter in "ub" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype("?")},
}


def _unordered(a: Values, b: Values) -> Values:
    """Where one of both is NaN."""
    return np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(1, bool)


# Comparisons with NaN are false, but true for the names that end in "u".
COMPARISONS: dict[str, Callable[[Values, Values], Values]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & ~_unordered(a, b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda a, b: (a == b) | _unordered(a, b),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": _unordered,
    "num": lambda a, b: ~_unordered(a, b),
}


def _fma(mode: str, a: Values, b: Values, c: Values) -> Values:
    exact = a.astype(np.float64) * b + c
    rounded = exact.astype(np.float32)
    if mode == "rm":  # towards minus infinity
        return np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    return rounded


def _cut(values: Values) -> Values:
    """With the largest error that `tanh.approx` may have, 2^-11 of the value: the last 12 bits are lost."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)


def _wide(a: Values, b: Values) -> Values:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(wide) * b.astype(wide)


def _high(a: Values, b: Values) -> Values:
    if a.dtype.itemsize == 8:
        products = a.astype(object) * b.astype(object)
        return np.array([int(product) >> 64 for product in np.atleast_1d(products)]).astype(a.dtype)
    return (_wide(a, b) >> (8 * a.dtype.itemsize)).astype(a.dtype)


def _shift(how: Callable[[Values, Values], Values], a: Values, count: Values) -> Values:
    bits = 8 * a.dtype.itemsize
    shifted = how(a, np.minimum(count, bits - 1).astype(a.dtype))
    if a.dtype.kind == "i" and how is np.right_shift:
        return shifted  # what lies beyond is sign
    return np.where(count >= bits, a.dtype.type(0), shifted)


def _insert_bits(source: Values, into: Values, place: Values, length: Values) -> Values:
    mask = (((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << place.astype(np.uint64)).astype(into.dtype)
    return (into & ~mask) | ((source << place.astype(into.dtype)) & mask)


ROUNDINGS = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}
"""Of a float to a whole number."""


def convert(value: Values, to: Any, modifiers: tuple[str, ...]) -> Values:
    """`cvt`: integers are cut or extended; floats become integers with NaN as 0 and saturation."""
    if "sat" in modifiers:
        return np.nan_to_num(np.clip(value, 0, 1)).astype(to)
    whole = next((ROUNDINGS[name](value) for name in modifiers if name in ROUNDINGS), value)
    if value.dtype.kind == "f" and to.kind != "f":
        bounds = np.iinfo(to)
        return np.clip(np.nan_to_num(whole.astype(np.float64)), bounds.min, bounds.max).astype(to)
    return whole.astype(to)


def pack_halves(upper: Values, lower: Values, kind: str) -> Values:
    """`cvt` of two float32 to "f16x2" or "bf16x2", rounded to nearest even."""
    if kind == "f16x2":
        halves = [half.astype(np.float16).view(np.uint16) for half in (upper, lower)]
    else:
        bits = [half.view(np.uint32) for half in (upper, lower)]
        halves = [((word + np.uint32(0x7FFF) + (word >> 16 & 1)) >> 16).astype(np.uint16) for word in bits]
        halves = [
            np.where(np.isnan(half), np.uint16(0x7FFF), word) for half, word in zip((upper, lower), halves, strict=True)
        ]
    return halves[0].astype(np.uint32) << np.uint32(16) | halves[1]


# By first part of the instruction; operands have the instruction's type, the result has what comes out.
ARITHMETIC: dict[str, Callable[..., Values]] = {
    "mov": lambda a: a,
    "add": np.add,
    "sub": np.subtract,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": lambda a: np.float32(1) / a,
    "rsqrt": lambda a: np.float32(1) / np.sqrt(a),
    "tanh": lambda a: _cut(np.tanh(a)),
    "ex2": lambda a: np.exp2(a.astype(np.float64)).astype(np.float32),
    "abs": np.abs,
    "neg": np.negative,
    "copysign": lambda sign, size: np.copysign(size, sign),
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "popc": lambda a: np.unpackbits(a[:, None].view(np.uint8), axis=1).sum(axis=1, dtype=np.uint32),
    "shl": lambda a, count: _shift(np.left_shift, a, count),
    "shr": lambda a, count: _shift(np.right_shift, a, count),
    "bfi": _insert_bits,
}
FLOAT_EXTREMES = {"max": np.fmax, "min": np.fmin}  # NaN only where both are
WHOLE_EXTREMES = {"max": np.maximum, "min": np.minimum}


def function_of(parts: tuple[str, ...]) -> Callable[..., Values] | None:
    """The function of an arithmetic instruction, or None if it is none."""
    name, modifiers = parts[0], parts[1:]
    if name == "fma":
        return lambda a, b, c: _fma(modifiers[0], a, b, c)
    if name in ("max", "min"):
        return (FLOAT_EXTREMES if modifiers[-1] == "f32" else WHOLE_EXTREMES)[name]
    if name in ("mul", "mad"):
        product = {"wide": _wide, "hi": _high}.get(modifiers[0], np.multiply)
        return product if name == "mul" else lambda a, b, c: product(a, b) + c
    return ARITHMETIC.get(name)
