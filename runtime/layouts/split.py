"""What every layout gives: the splits of a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from asag.runtime.coco_file import CocoAnnotations, coco_annotations, read_coco_file
from asag.runtime.preprocessing import picture_size


@dataclass
class LostPictures:
    """Pictures that had to be left out because their size is not known."""

    missing: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Why, by name."""


Entries = Callable[[bool, LostPictures | None], dict[str, Any]]
"""Reads the content of an annotation file in COCO's format out of another layout; takes what `Split.read` takes."""


@dataclass(frozen=True)
class Split:
    """A part of a data set, found and not read yet."""

    name: str
    images: Path
    """The folder that the pictures' names are relative to."""
    annotations: Path
    """The file or folder that says what is in them."""
    entries: Entries | None = None
    """None where `annotations` is a file in COCO's format."""

    def read(self, stored_pixels: bool = False, lost: LostPictures | None = None) -> CocoAnnotations:
        """What is annotated, by the rules of :func:`runtime.coco_file.read_coco_file`, whatever the layout.

        Where boxes are fractions of the picture its header is read, with `stored_pixels` without regard to its EXIF
        orientation; a picture without one is added to `lost` and left out, or where that is None a FileNotFoundError or
        ValueError.
        """
        if self.entries is None:
            return read_coco_file(self.annotations)
        return coco_annotations(self.entries(stored_pixels, lost), self.annotations)


@dataclass(frozen=True)
class Layout:
    """A way to lay out a data set."""

    name: str
    looks_for: str
    """What it looks for in a folder, for a person; SPLIT stands for the split's name."""
    splits: Callable[[Path], dict[str, Split]]
    """Takes the folder (or the file that names the folders); the splits found there, by name."""


def readable_size(path: Path, stored_pixels: bool, name: str, lost: LostPictures | None) -> tuple[int, int] | None:
    """(width, height) of a picture; None for one whose `name` was added to `lost`. See :meth:`Split.read`."""
    try:
        return picture_size(path, stored_pixels)
    except FileNotFoundError:
        if lost is None:
            raise
        lost.missing.append(name)
    except ValueError as error:
        if lost is None:
            raise
        lost.unreadable[name] = str(error)
    return None


def pictures_in(folder: Path) -> list[str]:
    """Names of the pictures in a folder and those below it, relative to it, sorted; judged by their suffixes."""
    suffixes = set(Image.registered_extensions())
    found = []
    for where, _, names in os.walk(folder, followlinks=True):
        base = Path(where).relative_to(folder)
        found += [(base / name).as_posix() for name in names if Path(name).suffix.lower() in suffixes]
    return sorted(name for name in found if not Path(name).name.startswith("."))


def first_folder(candidates: Iterable[Path]) -> Path | None:
    """The first that is a folder."""
    return next((folder for folder in candidates if folder.is_dir()), None)
