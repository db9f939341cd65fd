"""Records as JSON: read strictly into frozen dataclasses, whatever is wrong told in one line, and written.

The fields' types say what a file must hold: a field without a default must be there, and unknown names are passed over.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from asag.runtime.errors import one_line

Record = TypeVar("Record")

NULL_IS_NAN = msgspec.Meta(extra={"null": math.nan})
NULL_IS_INFINITE = msgspec.Meta(extra={"null": math.inf})
"""Marks of a field's type: in it and in all that it holds, null where a number must be stands for that number.
JSON has neither of them, and :func:`to_json` writes null for both."""

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "Path": "a path",
    "array": "a list",
    "object": "an object",
}


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON values of a file; FileNotFoundError, or ValueError in one line where it holds none."""
    try:
        return msgspec.json.decode(Path(path).read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise ValueError(f"cannot read {os.fspath(path)} as JSON: {one_line(error)}") from None


def to_json(record: Any) -> Any:
    """A dataclass, or a collection of some, as JSON values: null for what is no finite number, paths as text."""
    return msgspec.json.decode(msgspec.json.encode(record, enc_hook=_path_text))


def convert(values: Any, kind: type[Record], name: str = "") -> Record:
    """JSON values, which may hold finished dataclasses, as ``kind``.

    Raises ValueError in one line that says which field is wrong and what it must be; ``name`` is what the whole is
    called in it.
    """
    try:
        return msgspec.convert(_with_numbers(values, inspect.type_info(kind)), kind, dec_hook=_as_path)
    except msgspec.ValidationError as error:
        raise ValueError(_in_words(error, name)) from None


def convert_fields(record: Any) -> None:
    """Give the fields of a new frozen dataclass their types, lists as tuples; to be called by its ``__post_init__``.

    Raises ValueError in one line with the field, its value and what it must be.
    """
    for name, kind in typing.get_type_hints(type(record), include_extras=True).items():
        value = getattr(record, name)
        try:
            object.__setattr__(record, name, msgspec.convert(value, kind, dec_hook=_as_path))
        except msgspec.ValidationError as error:
            raise ValueError(f"{name} is {reprlib.repr(value)}; {_in_words(error, '')}") from None


def check_format(path: str | os.PathLike[str], found: Any, known: int, remedy: str) -> None:
    """Raise ValueError, with the ``remedy``, unless the format ``found`` in a file is the one this version reads."""
    if type(found) is int and found > known:
        written = f"was written by a newer version of asag (format {found}, this version reads {known})"
        raise ValueError(f"{os.fspath(path)} {written}: update asag, or {remedy}")
    if type(found) is not int or found != known:
        raise ValueError(f"{os.fspath(path)} is of format {reprlib.repr(found)}, this version reads {known}: {remedy}")


def _in_words(error: msgspec.ValidationError, name: str) -> str:
    """The library's "Expected `int`, got `str` - at `$.rows[0].images`" as "rows[0].images must be a whole number"."""
    found = re.fullmatch(r"(.*?)(?: - at `\$(.*?)`)?", " ".join(str(error).split()))
    assert found is not None
    text, place = found[1], (name + (found[2] or "")).removeprefix(".")
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", text):
        return f"{place}.{missing[1]} is missing".removeprefix(".")
    if not text.startswith("Expected "):
        return f"{place}: {text}" if place else text
    expected = re.sub("`(.*?)`", _kinds_in_words, text.removeprefix("Expected ").partition(", got ")[0])
    return f"{place or 'it'} must be {expected}"


def _kinds_in_words(kinds: re.Match[str]) -> str:
    return " or ".join(_WORDS.get(kind, kind) for kind in kinds[1].split(" | "))


def _with_numbers(value: Any, kind: inspect.Type, null: float | None = None) -> Any:
    """JSON values with the marked numbers in place of null; what does not fit ``kind`` stays as it is."""
    if isinstance(kind, inspect.Metadata):
        null, kind = (kind.extra or {}).get("null", null), kind.type
    if value is None:
        return null if isinstance(kind, inspect.FloatType) else None
    if isinstance(kind, inspect.UnionType):
        kind = next(choice for choice in kind.types if not isinstance(choice, inspect.NoneType))
    if isinstance(kind, inspect.DataclassType) and isinstance(value, Mapping):
        types = {field.name: field.type for field in kind.fields}
        return {key: _with_numbers(entry, types[key], null) if key in types else entry for key, entry in value.items()}
    if isinstance(kind, inspect.DictType) and isinstance(value, Mapping):
        return {key: _with_numbers(entry, kind.value_type, null) for key, entry in value.items()}
    if isinstance(kind, inspect.VarTupleType) and isinstance(value, list):
        return [_with_numbers(entry, kind.item_type, null) for entry in value]
    return value


def _as_path(kind: type, value: Any) -> Any:
    return Path(value) if kind is Path and isinstance(value, str) else value


def _path_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} has no place in JSON")
