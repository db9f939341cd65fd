"""Writing files so that a killed program leaves no half-written one behind."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | os.PathLike[str], suffix: str | None = None) -> Iterator[Path]:
    """Give a temporary path in the folder of ``path``; when the block ends well it replaces ``path``.

    The folder is made when it is missing. An exception inside the block removes the temporary file and leaves an older
    ``path`` as it was. The temporary name keeps the suffix, for writers that choose their format by it, or ends in
    ``suffix``, so that what a killed program leaves is not taken for a finished file.
    """
    target = Path(path)
    ending = target.suffix if suffix is None else suffix
    if target.is_dir():
        raise ValueError(f"cannot write {target}: it is a folder; name a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=ending, dir=target.parent)
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror or error}") from None
    os.close(descriptor)
    temporary = Path(name)
    try:
        with _naming(target):
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a hidden temporary folder beside ``path``; when the block ends well it becomes ``path``.

    ``path`` may be an empty folder. An exception inside the block removes the temporary folder.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror or error}") from None
    try:
        with _naming(target):
            temporary.chmod(0o777 & ~_umask())
            yield temporary
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Name the file where the system's error names none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise OSError(f"cannot write {target}: {error.strerror}") from error


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write ``content`` to ``path`` atomically as UTF-8."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 2) -> None:
    """Write ``content`` to ``path`` atomically as JSON; not-a-number values are refused with ValueError."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def _umask() -> int:
    # What is temporary is private to its owner; in the end it gets the permissions an ordinary new file has.
    mask = os.umask(0)
    os.umask(mask)
    return mask
