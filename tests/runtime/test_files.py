from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from asag.runtime.files import atomic_folder, atomic_path, write_bytes, write_json


def test_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "data.bin"
    write_bytes(target, b"one")
    write_bytes(target, b"two")
    assert target.read_bytes() == b"two"
    assert [path.name for path in target.parent.iterdir()] == ["data.bin"]
    assert target.stat().st_mode & 0o400


def write_half(target: Path) -> None:
    with atomic_path(target) as temporary:
        assert temporary.suffix == target.suffix
        temporary.write_text("half")
        raise RuntimeError("killed")


def test_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "data.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError, match="killed"):
        write_half(target)
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"a": float("nan")})
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_a_folder_or_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is a folder"):
        write_bytes(tmp_path, b"")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        write_bytes(tmp_path / "file" / "inside", b"")


@pytest.mark.parametrize("place", [atomic_path, atomic_folder])
def test_a_full_disk_names_the_file(place: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^cannot write .*target: No space left on device$"), place(tmp_path / "target"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())
