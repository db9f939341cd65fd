from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import pytest

from asag.runtime.records import (
    NULL_IS_INFINITE,
    NULL_IS_NAN,
    check_format,
    convert,
    convert_fields,
    read_json,
    to_json,
)


@dataclasses.dataclass(frozen=True)
class Part:
    size: float
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("a part has\na size")


@dataclasses.dataclass(frozen=True)
class Whole:
    count: int
    parts: Annotated[tuple[Part, ...], NULL_IS_INFINITE]
    shares: Annotated[Mapping[str, float] | None, NULL_IS_NAN]
    first: Part | None = None
    folder: Path | None = None


WHOLE = Whole(3, (Part(1.5, ("a", "b")), Part(math.inf)), {"x": math.nan, "y": 0.5}, Part(2.0), Path("runs"))
VALUES = {
    "count": 3,
    "parts": [{"size": 1.5, "names": ["a", "b"]}, {"size": None, "names": []}],
    "shares": {"x": None, "y": 0.5},
    "first": {"size": 2.0, "names": []},
    "folder": "runs",
}


def test_there_and_back() -> None:
    assert to_json(WHOLE) == VALUES
    again = convert(VALUES, Whole)
    assert again == dataclasses.replace(WHOLE, shares=again.shares)
    assert again.shares is not None
    assert math.isnan(again.shares["x"])
    assert again.shares["y"] == 0.5


def test_a_newer_file_may_say_more_and_what_has_a_default_may_be_missing() -> None:
    assert convert({"count": 1, "parts": [{"size": 1, "later": None}], "shares": None, "later": [1]}, Whole) == Whole(
        1, (Part(1.0),), None
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": True}, "count must be a whole number"),
        ({"count": 1.0}, "count must be a whole number"),
        ({"count": None}, "count must be a whole number"),
        ({"parts": {}}, "parts must be a list"),
        ({"parts": [{"size": 1}, {}]}, "parts[1].size is missing"),
        ({"parts": [{"size": -1}]}, "parts[0]: a part has a size"),
        ({"parts": [{"size": 1, "names": [None]}]}, "parts[0].names[0] must be a text"),
        ({"shares": {"x": "none"}}, "shares[...] must be a number"),
        ({"first": 3}, "first must be an object or null"),
        ({"first": {"size": None}}, "first.size must be a number"),
        ({"folder": 3}, "folder must be a path"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared)
        convert(VALUES | change, Whole)
    assert str(caught.value) == message


def test_the_whole_has_a_name() -> None:
    with pytest.raises(ValueError, match=r"^it must be an object$"):
        convert(None, Whole)
    with pytest.raises(ValueError, match=r"^the record must be an object$"):
        convert(None, Whole, "the record")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{} {}",
        b"NaN",
        b"\xef\xbb\xbf{}",
        b'"\xff"',
        b'{"a": "\xc3\x28"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 100_000,
        b"1e999",
        "{}".encode("utf-16"),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_json_is_one_line_with_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*record\.json as JSON: ") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .* as JSON: .*directory"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


@dataclasses.dataclass(frozen=True)
class Checked:
    sides: tuple[int, int]
    folder: Path

    def __post_init__(self) -> None:
        convert_fields(self)


def test_a_new_record_converts_its_fields() -> None:
    made = Checked([3, 4], "runs")  # type: ignore[arg-type]
    assert (made.sides, made.folder) == ((3, 4), Path("runs"))
    with pytest.raises(ValueError, match=r"^sides is \[3\]; it must be a list of length 2$"):
        Checked([3], "runs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^sides is \(3, '9+\.\.\.9+'\); \[1\] must be a whole number$"):
        Checked((3, "9" * 5000), "runs")  # type: ignore[arg-type]


@pytest.mark.parametrize("found", [True, None, "2", 2.0, 1, -1])
def test_another_format_asks_for_the_remedy(found: object) -> None:
    with pytest.raises(ValueError, match=r"^a\.json is of format .*, this version reads 2: make it again$"):
        check_format("a.json", found, 2, "make it again")


def test_a_newer_format_asks_for_a_newer_version() -> None:
    check_format("a.json", 2, 2, "make it again")
    with pytest.raises(ValueError, match=r"a newer version of asag \(format 3, .*\): update asag, or make it again$"):
        check_format("a.json", 3, 2, "make it again")
