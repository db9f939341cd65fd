"""What a data set holds, and what is wrong with it, before anybody trains on it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from asag.runtime.coco_dataset import CocoFolder, missing_files, spread
from asag.runtime.coco_file import Id, name_key
from asag.runtime.contact_sheet import annotated_cell, write_sheet
from asag.runtime.layouts.find import find_splits
from asag.runtime.layouts.split import LostPictures
from asag.runtime.preprocessing import load_image, picture_size, resized_size

SMALL, MEDIUM = 32**2, 96**2
"""Areas in pixels under which COCO's evaluation calls an object small, or medium."""

SHORTER_SIDE, LONGER_SIDE = 800, 1333
"""What most presets resize to."""

TINY = 8
"""Pixels of a box's shorter side, after that, under which detectors see little."""

Progress = Callable[[int, int], None]
"""Called with how many pictures are done, and of how many."""


@dataclass(frozen=True)
class SplitCheck:
    """What one split holds. Counts are of objects, without those to ignore; names are files relative to `folder`."""

    name: str
    annotations: Path
    folder: Path
    images: int
    objects: int
    ignored: int
    """Crowds and others where nothing counts."""
    objects_of_class: Mapping[str, int]
    images_of_class: Mapping[str, int]
    small: int
    medium: int
    large: int
    tiny: int
    """Boxes whose shorter side is under 8 pixels once the image is resized to 800, at most 1333."""
    images_without_objects: int
    left_out: Mapping[str, int]
    """What does not count, by reason; see docs/training.md."""
    mistakes: bool
    """Whether some of it is a mistake in the annotations."""
    missing: tuple[str, ...]
    unreadable: Mapping[str, str]
    """Why, by picture."""
    other_size: tuple[str, ...]
    """Pictures of another size than annotated."""
    turned: int
    """How many of these have the annotated size as stored, before their EXIF orientation turns them."""

    def problems(self) -> Iterator[str]:
        """What is wrong, a line each."""
        if self.mistakes:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items() if count)
            yield f"{self.name}: left out of {self.annotations}: {reasons}"
        if not self.objects:
            yield f"{self.name}: no objects"
        for files, what in (
            (self.missing, "missing"),
            (self.other_size, f"of another size than annotated, {self.turned} for their EXIF orientation"),
        ):
            if files:
                yield f"{self.name}: {len(files)} pictures {what}: {_first(files)}"
        if self.unreadable:
            yield f"{self.name}: {len(self.unreadable)} pictures unreadable: {_first(list(self.unreadable.values()))}"


@dataclass(frozen=True)
class DatasetCheck:
    """What a data set holds."""

    folder: Path
    splits: tuple[SplitCheck, ...]
    compared: int
    """Pictures whose content was compared."""
    duplicates_within: tuple[tuple[str, ...], ...]
    """Groups of equal files of one split, as ``split: name``."""
    duplicates_across: tuple[tuple[str, ...], ...]
    """Groups of equal files of several splits likewise."""
    other_categories: tuple[str, ...]
    """How the splits' categories differ, by id or by name, a line each."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, a line each; empty for a sound data set."""
        lines = [line for split in self.splits for line in split.problems()]
        for groups, where in ((self.duplicates_within, "within a split"), (self.duplicates_across, "across splits")):
            if groups:
                lines.append(
                    f"{len(groups)} pictures are there more than once {where}, such as {' = '.join(groups[0])}"
                )
        return (*lines, *self.other_categories)


def check_dataset(
    path: str | os.PathLike[str], stored_pixels: bool = False, decode: bool = False, progress: Progress | None = None
) -> DatasetCheck:
    """Look through all splits of a data set, in any known layout.

    Of every picture the header is read or, with `decode`, the whole; equal files are found by their content's hash,
    which is computed where two have one length. With `stored_pixels` pictures are seen without their EXIF orientation.
    Raises what :func:`runtime.layouts.find.find_splits` and reading annotations raise.
    """
    lost: dict[str, LostPictures] = defaultdict(LostPictures)
    folders = {
        name: CocoFolder(split.images, split.read(stored_pixels, lost[name]), stored_pixels)
        for name, split in find_splits(path).items()
    }
    total, done = sum(map(len, folders.values())), 0
    checks, files = [], []
    for name, folder in folders.items():
        pictures = _Pictures(lost[name])
        missing = set(missing_files(folder.images_dir, [image.file_name for image in folder.images.values()]))
        for image_id, image in folder.images.items():
            if image.file_name in missing:
                pictures.lost.missing.append(image.file_name)
            else:
                pictures.look_at(folder, image_id, decode)
                files.append((name, image.file_name, folder.path(image_id)))
            done += 1
            if progress is not None:
                progress(done, total)
        checks.append(_check(name, folder, pictures))
    within, across = _duplicates(files)
    differing = tuple(_differing_categories(folders))
    return DatasetCheck(Path(path), tuple(checks), len(files), within, across, differing)


def write_annotated_sheet(
    path: str | os.PathLike[str], data: str | os.PathLike[str], stored_pixels: bool = False, most: int = 25
) -> None:
    """Write a grid of pictures with their annotated boxes, evenly spread over the splits; unreadable ones are left out.

    Raises ValueError where none can be read or the file cannot be written.
    """
    splits = find_splits(data).values()
    cells: list[Image.Image] = []
    for split in splits:
        folder = CocoFolder(split.images, split.read(stored_pixels, LostPictures()), stored_pixels)
        for image_id in spread(folder.image_ids, -(-most // len(splits)))[: -(-most // len(splits))]:
            with contextlib.suppress(FileNotFoundError, ValueError):
                cells.append(annotated_cell(folder, image_id))
    if not cells:
        raise ValueError(f"no picture of {data} can be read in the size that its annotations say")
    write_sheet(path, cells[:most])


@dataclass
class _Pictures:
    """What is found in the files of a split."""

    lost: LostPictures
    other_size: list[str] = field(default_factory=list)
    turned: int = 0

    def look_at(self, folder: CocoFolder, image_id: Id, decode: bool) -> None:
        """Read a picture and compare its size with the annotated one."""
        image, path = folder.images[image_id], folder.path(image_id)
        try:
            size = load_image(path, folder.stored_pixels).size if decode else picture_size(path, folder.stored_pixels)
        except (FileNotFoundError, ValueError) as error:
            self.lost.unreadable[image.file_name] = str(error)
            return
        if size != (image.width, image.height):
            self.other_size.append(image.file_name)
            as_stored = picture_size(path, stored_pixels=True)
            self.turned += as_stored != size and as_stored == (image.width, image.height)


def _check(name: str, folder: CocoFolder, pictures: _Pictures) -> SplitCheck:
    found = folder.annotations
    counted = ~found.crowd
    places, labels, areas = found.places[counted], found.labels[counted], found.areas[counted]
    classes = len(folder.category_names)
    objects = np.bincount(labels, minlength=classes).tolist()
    images = np.bincount(np.unique(np.stack((places, labels)), axis=1)[1], minlength=classes).tolist()
    scales = np.array([_scale(image.height, image.width) for image in found.images])
    shorter = found.boxes[counted, 2:].min(axis=1, initial=np.inf) * scales[places]
    return SplitCheck(
        name=name,
        annotations=folder.annotations_path,
        folder=folder.images_dir,
        images=len(folder),
        objects=len(labels),
        ignored=int(found.crowd.sum()),
        objects_of_class=dict(zip(folder.category_names, objects, strict=True)),
        images_of_class=dict(zip(folder.category_names, images, strict=True)),
        small=int((areas < SMALL).sum()),
        medium=int(((areas >= SMALL) & (areas < MEDIUM)).sum()),
        large=int((areas >= MEDIUM).sum()),
        tiny=int((shorter < TINY).sum()),
        images_without_objects=len(folder) - len(np.unique(places)),
        left_out={reason: count for reason, count in found.left_out.reasons.items() if count},
        mistakes=found.left_out.wrong,
        missing=tuple(pictures.lost.missing),
        unreadable=pictures.lost.unreadable,
        other_size=tuple(pictures.other_size),
        turned=pictures.turned,
    )


def _scale(height: int, width: int) -> float:
    """By how much an image of that size is enlarged."""
    return min(resized_size(height, width, SHORTER_SIDE, LONGER_SIDE)) / min(height, width)


Groups = tuple[tuple[str, ...], ...]


def _duplicates(files: Sequence[tuple[str, str, Path]]) -> tuple[Groups, Groups]:
    """Groups of equal files, given as (split, name, path): those within one split, and those across several."""
    within: list[tuple[str, ...]] = []
    across: list[tuple[str, ...]] = []
    for places in equal_files([path for _, _, path in files]):
        several = len({files[place][0] for place in places}) > 1
        (across if several else within).append(tuple(f"{files[place][0]}: {files[place][1]}" for place in places))
    return tuple(within), tuple(across)


def equal_files(paths: Sequence[Path]) -> list[list[int]]:
    """Groups of places in `paths` whose files hold the same bytes. Files of a length of their own are not read."""
    return [same for alike in _groups(paths, range(len(paths)), _length) for same in _groups(paths, alike, _digest)]


def _groups(paths: Sequence[Path], places: Sequence[int], key: Callable[[Path], Hashable]) -> list[list[int]]:
    """Those of the places that have a key in common, in groups of two and more."""
    by_key: dict[Hashable, list[int]] = defaultdict(list)
    for place in places:
        by_key[key(paths[place])].append(place)
    return [group for group in by_key.values() if len(group) > 1]


def _length(path: Path) -> int:
    return path.stat().st_size


def _digest(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _differing_categories(folders: Mapping[str, CocoFolder]) -> Iterator[str]:
    """A line for every split whose categories are not those of the first."""
    classes = {
        name: {name_key(text): number for number, text in zip(one.category_ids, one.category_names, strict=True)}
        for name, one in folders.items()
    }
    (first, ours), *others = classes.items()
    for name, theirs in others:
        if ours == theirs:
            continue
        lines = [
            f"{', '.join(missing)} only in {where}"
            for missing, where in (
                ([n for n in ours if n not in theirs], first),
                ([n for n in theirs if n not in ours], name),
            )
            if missing
        ]
        moved = [text for text in ours if text in theirs and ours[text] != theirs[text]]
        if moved:
            text = moved[0]
            lines.append(f"{len(moved)} under other ids, such as {text}: {ours[text]} and {theirs[text]}")
        yield f"the categories of {first} and {name} differ: {'; '.join(lines)}"


def _first(names: Sequence[str], most: int = 3) -> str:
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])
