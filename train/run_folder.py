"""A run's folder belongs to one run at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def held_folder(folder: Path, holding: bool) -> Iterator[None]:
    """Make `folder` and keep other runs out of it until the block ends; a killed process lets go of it by itself.

    holding: whether this process is the one of its run that writes. A folder that nothing was written into is removed
    again. Raises ValueError where another run is in the folder, or where it cannot be made. File systems without locks
    keep nobody out.
    """
    if not holding:
        yield
        return
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error.strerror or error}; name another folder") from None
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is training in {folder}: wait for its end, or name another folder") from None
    except OSError:
        return
