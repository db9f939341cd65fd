"""Pictures and annotated boxes of a data set, as training, evaluation, parity and quantization see them."""

from __future__ import annotations

import copy
import logging
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from asag.runtime.coco_file import CocoAnnotations, CocoImage, Id, left_out_sentence, name_key, read_coco_file
from asag.runtime.layouts.find import find_split
from asag.runtime.metadata import ModelMetadata
from asag.runtime.preprocessing import load_image, picture_size

logger = logging.getLogger(__name__)

MOST_CHECKED_SIZES = 2000
"""So many pictures' sizes are compared with the annotations' before anything runs; only headers are read."""

_Value = TypeVar("_Value")


class CocoFolder:
    """Images and box annotations, of a file in COCO's format or of what a folder's layout gave (runtime/layouts).

    ``images`` are by id, in the file's order. ``category_ids`` and ``category_names`` are the classes by rising id; ids
    that are text get numbers, from 1. With `stored_pixels` pictures are read as they are stored, whatever their EXIF
    orientation says. What the file holds that does not count is a warning. Raises FileNotFoundError or ValueError
    naming what was looked for or what is wrong.
    """

    def __init__(
        self,
        images_dir: str | os.PathLike[str],
        annotations: str | os.PathLike[str] | CocoAnnotations,
        stored_pixels: bool = False,
    ) -> None:
        self.images_dir, self.stored_pixels = Path(images_dir), stored_pixels
        if not isinstance(annotations, CocoAnnotations) and not Path(annotations).is_file():
            raise FileNotFoundError(f"no annotations: looked for {Path(annotations)}")
        if not self.images_dir.is_dir():
            raise FileNotFoundError(f"no images: looked for the folder {self.images_dir}")
        read = annotations if isinstance(annotations, CocoAnnotations) else read_coco_file(annotations)
        self.annotations, self.annotations_path = read, read.path
        self.images: dict[Id, CocoImage] = {image.id: image for image in self.annotations.images}
        self._check_names()
        self._places = {image_id: place for place, image_id in enumerate(self.images)}
        ids = [category.id for category in self.annotations.categories]
        numbered = all(isinstance(identifier, int) for identifier in ids)
        self.category_ids: tuple[int, ...] = tuple(ids) if numbered else tuple(range(1, len(ids) + 1))  # type: ignore[arg-type]
        self.category_names = tuple(category.name for category in self.annotations.categories)

    def _check_names(self) -> None:
        """ValueError where two images are one file, one of them by its full path."""
        if not any(image.file_name.startswith(("/", "../")) for image in self.annotations.images):
            return  # the reader's names within the folder are without detours
        seen: dict[str, str] = {}
        for image in self.annotations.images:
            first = seen.setdefault(os.path.normpath(self.images_dir / image.file_name), image.file_name)
            if first != image.file_name:
                raise ValueError(
                    f"{self.annotations_path}: {first} and {image.file_name} are one picture: keep one name"
                )

    @property
    def image_ids(self) -> tuple[Id, ...]:
        """Ids of the images, in the file's order."""
        return tuple(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def path(self, image_id: Id) -> Path:
        """The image's file."""
        return self.images_dir / self.images[image_id].file_name

    def objects(self, image_id: Id) -> slice:
        """Where an image's objects are in the arrays of ``annotations``."""
        return self.annotations.of_image(self._places[image_id])

    def category_id(self, label: int) -> Id:
        """The file's own id of the class that ``category_ids`` calls `label`."""
        return self.annotations.categories[self.category_ids.index(label)].id

    def load(self, image_id: Id) -> Image.Image:
        """The image as RGB; ValueError when its size is not the annotated one, which would misplace every box."""
        image = load_image(self.path(image_id), stored_pixels=self.stored_pixels)
        self._check_size(image_id, image.size)
        return image

    def report(self) -> CocoFolder:
        """The folder itself, after a warning of what the file holds that does not count."""
        left_out = left_out_sentence(self.annotations.left_out.reasons)
        if left_out:
            objects = len(self.annotations.boxes)
            logger.warning("%s: %d images with %d objects%s", self.annotations_path, len(self), objects, left_out)
        return self

    def check_images(self, image_ids: Sequence[Id]) -> None:
        """Know before the first image runs that the last is there, in the stated size (:meth:`check_sizes`).

        Raises FileNotFoundError or ValueError.
        """
        missing = missing_files(self.images_dir, [self.images[image_id].file_name for image_id in image_ids])
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(image_ids)} images of {self.annotations_path} are missing in"
                f" {self.images_dir}, the first is {missing[0]}: {remedy_of_missing(self.images_dir, missing[0])}"
            )
        self.check_sizes(image_ids)

    def check_sizes(self, image_ids: Sequence[Id]) -> None:
        """ValueError unless pictures have the sizes that the annotations state.

        Those of all are compared or, of many, of evenly spread ones; only headers are read.
        """
        for image_id in spread(image_ids, MOST_CHECKED_SIZES):
            self._check_size(image_id, picture_size(self.path(image_id), self.stored_pixels))

    def _check_size(self, image_id: Id, size: tuple[int, int]) -> None:
        """ValueError unless the (width, height) of an image's file is the annotated one."""
        image = self.images[image_id]
        check_size(self.path(image_id), size, (image.width, image.height), self.annotations_path, self.stored_pixels)

    def for_model(self, metadata: ModelMetadata, classes: Sequence[str] = ()) -> CocoFolder:
        """The data set with the model's category ids; see :meth:`with_classes`."""
        return self.with_classes(
            metadata.category_ids, metadata.category_names, "the model's classes", classes, "--classes"
        )

    def with_classes(
        self,
        ids: Sequence[int],
        names: Sequence[str],
        whose: str,
        classes: Sequence[str] = (),
        option: str | None = None,
    ) -> CocoFolder:
        """The data set with the category ids of somebody else's classes.

        Without `classes` both must have the same ones, by id and by name. With them, only these count, matched by name.
        Raises ValueError with both lists, which calls the others `whose` and advises the `option` that gives `classes`.
        """
        ours = {name_key(name): number for number, name in zip(self.category_ids, self.category_names, strict=True)}
        theirs = {name_key(name): number for number, name in zip(ids, names, strict=True)}
        if not classes and ours == theirs:
            return self
        both = f"{whose} are {_some(theirs)}; those of {self.annotations_path} are {_some(ours)}"
        if not classes:
            common = ",".join(name for name in theirs if name in ours)
            remedy = f'; {option} "{common}" counts what both have, by name' if common and option else ""
            raise ValueError(f"the classes are not the same: {both}{remedy}")
        wanted = [name_key(name) for name in classes]
        unknown = [name for name in wanted if name not in ours or name not in theirs]
        if unknown:
            raise ValueError(f"no class {unknown[0]!r} in both: {both}")
        return self._only([theirs[key] if (key := name_key(name)) in wanted else None for name in self.category_names])

    def _only(self, new_ids: Sequence[int | None]) -> CocoFolder:
        """The data set with other ids of its classes, without those that get None."""
        kept = [label for label, number in enumerate(new_ids) if number is not None]
        kept.sort(key=lambda label: new_ids[label] or 0)
        label_of = np.full(len(new_ids), -1)
        label_of[kept] = range(len(kept))
        held = label_of[self.annotations.labels] >= 0
        folder = copy.copy(self)
        folder.annotations = replace(
            self.annotations,
            categories=tuple(self.annotations.categories[label] for label in kept),
            places=self.annotations.places[held],
            labels=label_of[self.annotations.labels[held]],
            boxes=self.annotations.boxes[held],
            areas=self.annotations.areas[held],
            crowd=self.annotations.crowd[held],
        )
        folder.category_ids = tuple(number for label in kept if (number := new_ids[label]) is not None)
        folder.category_names = tuple(category.name for category in folder.annotations.categories)
        return folder


def open_coco(path: str | os.PathLike[str], split: str = "val2017", stored_pixels: bool = False) -> CocoFolder:
    """Open a split of a data set in any known layout; see :func:`runtime.layouts.find.find_split`."""
    found = find_split(path, split)
    return CocoFolder(found.images, found.read(stored_pixels), stored_pixels).report()


def check_size(
    path: Path, size: tuple[int, int], stated: tuple[int, int], annotations: Path, stored_pixels: bool
) -> None:
    """ValueError unless a picture's (width, height) is the annotated one."""
    if size == stated:
        return
    text = f"{path} is {size[0]} x {size[1]} pixels, but {annotations.name} says {stated[0]} x {stated[1]}: "
    if not stored_pixels and size == stated[::-1] == picture_size(path, stored_pixels=True)[::-1]:
        raise ValueError(
            f"{text}its EXIF orientation turns the picture, and the annotations were made on the pixels as stored;"
            " --stored-pixels (in training, --set stored_pixels=true) reads all pictures so"
        )
    raise ValueError(f"{text}the annotations belong to another picture")


def missing_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of the names, relative to the folder, that are no files there. The folder is listed once: that is faster
    than asking for each of many thousands."""
    with os.scandir(folder) as entries:
        present = {entry.name for entry in entries if entry.is_file()}
    return [name for name in names if name not in present and not _is_file(folder / name)]


def remedy_of_missing(folder: Path, name: str) -> str:
    """What to do about a picture that is not there."""
    last = PureWindowsPath(name).name  # knows both kinds of slashes
    if last != name and _is_file(folder / last):
        return f"{last} is there, so take the folders out of the names"
    with os.scandir(folder) as entries:
        if any(_folded(entry.name) == _folded(last) for entry in entries):
            return "one of that name is there, but in other case or with accents composed otherwise (convmv --nfc)"
    return "complete them, or take them out of the file"


def _folded(name: str) -> str:
    """A name without what some file systems do not tell apart."""
    return unicodedata.normalize("NFC", name).casefold()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def spread(values: Sequence[_Value], most: int) -> Sequence[_Value]:
    """All values or, of many, about `most` of them, evenly spread."""
    return values[:: max(1, len(values) // most)]


def clipped_boxes(boxes: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """x, y, width, height -> the same boxes as ``xyxy``, clipped to the image: [n, 4], pixels."""
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
    return np.clip(corners, 0, [width, height, width, height])


def _some(classes: Mapping[str, int]) -> str:
    listed = [f"{number} {name}" for name, number in classes.items()]
    return f"{len(listed)}: {', '.join([*listed[:12], *(['...'] if len(listed) > 12 else [])])}"
