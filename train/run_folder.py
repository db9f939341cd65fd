"""A run's folder belongs to one run at a time."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def held_folder(folder: Path, holding: bool, patience: float = 8.0) -> Iterator[None]:
    """Make `folder` and keep other runs out of it until the block ends; a killed process lets go of it by itself.

    holding: whether this process is the one of its run that writes. A folder that nothing was written into is removed
    again; patience: seconds to wait for the reading processes of a killed run, which end by themselves within five.
    Raises ValueError where another run is in the folder, or where it cannot be made. File systems without locks keep
    nobody out.
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
        _lock(descriptor, folder, time.monotonic() + patience)
        yield
    finally:
        os.close(descriptor)
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def _lock(descriptor: int, folder: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                told = f"another run is training in {folder}: wait for its end, or name another folder"
                raise ValueError(told) from None
            time.sleep(0.1)
        except OSError:
            return
        else:
            return
