"""The one reader of annotation files in COCO's format: for training, evaluation, parity and quantization.

Nothing of a file reaches another library unread: ids are compared as text and numbered anew, optional fields that are
absent or null get COCO's defaults, what is no object is left out and counted, and what cannot be decided is an error.
"""

from __future__ import annotations

import json
import logging
import math
import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag.runtime.errors import one_line

logger = logging.getLogger(__name__)

Id = int | str
"""An id as a file states it. 7 and "7" are the same id."""

FEWEST_TO_JUDGE, MOST_OUTSIDE = 10, 1 / 3
"""So many boxes, and this share of them out of their images, tell that a file's boxes are corners."""
SMALLEST_EXTENT, LARGEST_NUMBER = 0.01, 1e9
"""Pixels: a box of which less lies in the image is nothing that could be found, a larger number is no place."""
LARGEST_ID = (1 << 63) - 1
"""Of a category: detectors give them out as 64-bit numbers."""

_REQUIRED: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,), "height": (int, float), "width": (int, float)},
    "categories": {"id": (int, str), "name": (str,)},
    "annotations": {"image_id": (int, str), "category_id": (int, str)},
}


@dataclass(frozen=True)
class CocoImage:
    """An image of the file; sides in pixels. The name is without detours, so that one picture has one name."""

    id: Id
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class CocoCategory:
    """A class of the file."""

    id: Id
    name: str


@dataclass(frozen=True)
class LeftOut:
    """How many entries of a file do not count, and why; the rules are those of docs/training.md."""

    bad_boxes: int = 0
    repeated_images: int = 0
    merged_images: int = 0
    repeated_annotations: int = 0
    annotations_without_image: int = 0
    root_categories: tuple[str, ...] = ()

    @property
    def reasons(self) -> dict[str, int]:
        """What a person reads before the counts; zeros too."""
        return {
            "bad boxes (empty, outside the image or not numbers)": self.bad_boxes,
            "images listed twice": self.repeated_images,
            "images under another id, with their boxes under the first": self.merged_images,
            "annotations listed twice": self.repeated_annotations,
            "annotations of images that are not listed": self.annotations_without_image,
            f"root categories of a labelling tool ({', '.join(self.root_categories)})": len(self.root_categories),
        }

    @property
    def wrong(self) -> bool:
        """Whether something was left out that is a mistake in the file."""
        return bool(self.bad_boxes or self.repeated_images or self.merged_images or self.repeated_annotations)


def left_out_sentence(reasons: Mapping[str, int]) -> str:
    """``; left out: 3 bad boxes, ...`` of those that are not 0, or nothing."""
    parts = [f"{count} {reason}" for reason, count in reasons.items() if count]
    return f"; left out: {', '.join(parts)}" if parts else ""


@dataclass(frozen=True, eq=False)
class CocoAnnotations:
    """What an annotation file says: n objects, those of an image beside one another, in the file's order.

    ``categories`` are in the order of their ids. ``places`` [n] int64 are the objects' images, as places in
    ``images``; ``labels`` [n] int64 their classes, as places in ``categories``; ``boxes`` [n, 4] float64 are x, y,
    width and height in pixels, not clipped; ``areas`` [n] float64 decide between small, medium and large; ``crowd`` [n]
    bool marks regions where nothing counts (``iscrowd`` or ``ignore``).
    """

    path: Path
    images: tuple[CocoImage, ...]
    categories: tuple[CocoCategory, ...]
    places: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    left_out: LeftOut
    doubtful: frozenset[int] = frozenset()
    """Places of the images of bad boxes: something is there, and nobody knows where."""

    def of_image(self, place: int) -> slice:
        """The objects of the image at that place in ``images``."""
        first, last = np.searchsorted(self.places, (place, place + 1))
        return slice(int(first), int(last))


def read_coco_file(path: str | os.PathLike[str]) -> CocoAnnotations:
    """Read an annotation file in COCO's format (UTF-8, with or without a byte order mark).

    Left out and counted: boxes that are empty, outside their image or not four numbers; entries that repeat an
    image or an annotation; annotations of images that are not listed; a root category that a labelling tool adds. One
    picture under two ids is one image. Raises FileNotFoundError without such a file, and ValueError naming the first
    entry that cannot be understood.
    """
    path = Path(path)
    return coco_annotations(_parse(path), path)


def coco_annotations(content: Any, path: Path) -> CocoAnnotations:
    """What the content of an annotation file says, by the rules of :func:`read_coco_file`.

    `content` is what JSON holds; `path` is what error messages call it. Raises ValueError.
    """
    _check_sections(content, path)
    images, image_places, repeated, merged = _images(content["images"], path)
    categories = _categories(content["categories"], path)
    return _Objects(path, images, categories, merged).read(content, image_places, repeated)


def key_of(identifier: Id) -> str:
    """What two equal ids have in common."""
    return str(identifier)


def name_key(name: str) -> str:
    """What two equal names have in common: composed characters, no space around."""
    return unicodedata.normalize("NFC", name).strip()


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"annotation file not found: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path} as JSON: {one_line(error)}") from None


def _check_sections(content: Any, path: Path) -> None:
    """ValueError unless the lists are there, and every entry has what nothing can stand for."""
    for section in _REQUIRED:
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise ValueError(f"{path} is not a COCO annotation file: it has no list {section!r}")
    for section, fields in _REQUIRED.items():
        for index, entry in enumerate(content[section]):
            wrong = [name for name, kinds in fields.items() if not _has(entry, name, kinds)]
            if wrong:
                raise ValueError(f"{path}: {section}[{index}] has no proper {wrong[0]}")


def _has(entry: Any, name: str, kinds: tuple[type, ...]) -> bool:
    value = entry.get(name) if isinstance(entry, dict) else None
    if isinstance(value, str):
        return str in kinds and bool(value.strip()) and _is_unicode(value)
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON's escapes can also say halves of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _images(
    entries: Sequence[Mapping[str, Any]], path: Path
) -> tuple[tuple[CocoImage, ...], dict[str, int], int, set[int]]:
    """The images, their places by id, how many entries repeat one, and the places of those with several ids."""
    images: list[CocoImage] = []
    places: dict[str, int] = {}
    place_of_file: dict[str, int] = {}
    repeated, merged = 0, []
    for index, entry in enumerate(entries):
        height, width = (_side(entry[name], f"{path}: images[{index}]", name) for name in ("height", "width"))
        image = CocoImage(entry["id"], posixpath.normpath(entry["file_name"]), height, width)
        key = key_of(image.id)
        same_id = places.get(key)
        if same_id is not None:
            if _same_picture(images[same_id], image):
                repeated += 1
                continue
            raise ValueError(
                f"{path}: the image id {key} is used twice, for {images[same_id].file_name} and {image.file_name}, so"
                " nobody can tell whose its boxes are: number the images anew"
            )
        same_file = place_of_file.setdefault(image.file_name, len(images))
        if same_file == len(images):
            images.append(image)
        elif _same_picture(images[same_file], image):
            merged.append(same_file)
        else:
            raise ValueError(
                f"{path}: {image.file_name} is listed with two sizes, {images[same_file].width} x"
                f" {images[same_file].height} and {width} x {height}: keep the right one"
            )
        places[key] = same_file
    if not images:
        raise ValueError(f"{path} holds no images")
    return tuple(images), places, repeated, set(merged)


def _same_picture(first: CocoImage, second: CocoImage) -> bool:
    return (first.file_name, first.height, first.width) == (second.file_name, second.height, second.width)


def _side(value: float, where: str, name: str) -> int:
    if not 1 <= value < 1 << 31 or value != int(value):
        raise ValueError(f"{where} has no proper {name}: {one_line(ValueError(value), 40)}")
    return int(value)


def _categories(entries: Sequence[Mapping[str, Any]], path: Path) -> tuple[CocoCategory, ...]:
    """The categories by id. ValueError for none, and for an id that is used twice."""
    if not entries:
        raise ValueError(f"{path} names no categories")
    by_id: dict[str, CocoCategory] = {}
    for index, entry in enumerate(entries):
        if isinstance(entry["id"], int) and abs(entry["id"]) > LARGEST_ID:
            raise ValueError(f"{path}: categories[{index}] has no proper id: it takes more than 64 bits")
        category = CocoCategory(entry["id"], entry["name"])
        if by_id.setdefault(key_of(category.id), category) != category:
            raise ValueError(
                f"{path}: the category id {category.id} is used twice, for {by_id[key_of(category.id)].name!r} and"
                f" {category.name!r}"
            )
    return tuple(sorted(by_id.values(), key=lambda category: rank_of(category.id)))


def rank_of(identifier: Id) -> tuple[int, int, str]:
    """The order of ids: numbers by value, before text."""
    text = key_of(identifier)
    is_number = isinstance(identifier, int) or (text.isdecimal() and len(text) < 100)
    return (0, int(text), "") if is_number else (1, 0, text)


class _Objects:
    """The objects of a file while they are read."""

    def __init__(
        self, path: Path, images: tuple[CocoImage, ...], categories: tuple[CocoCategory, ...], merged: set[int]
    ) -> None:
        self.path, self.images, self.categories, self.merged = path, images, categories, merged
        self.rows: list[tuple[int, int, tuple[float, ...], float, bool]] = []
        self.counts: Counter[str] = Counter()
        self.doubtful: set[int] = set()
        self.seen: set[tuple[Any, ...]] = set()

    def read(
        self, content: Mapping[str, Any], image_places: Mapping[str, int], repeated_images: int
    ) -> CocoAnnotations:
        labels = {key_of(category.id): label for label, category in enumerate(self.categories)}
        for index, entry in enumerate(content["annotations"]):
            label = labels.get(key_of(entry["category_id"]))
            if label is None:
                raise ValueError(f"{self.path}: annotations[{index}] has an unknown category {entry['category_id']}")
            crowd = self._flag(entry, "iscrowd", index) or self._flag(entry, "ignore", index)
            place = image_places.get(key_of(entry["image_id"]))
            if place is None:
                # Common in subsets of a dataset, and harmless.
                self.counts["annotations_without_image"] += 1
            else:
                self._add(place, label, entry, crowd)
        used = {row[1] for row in self.rows}
        roots = _root_categories(content["categories"], [key_of(self.categories[label].id) for label in used])
        kept = [category for category in self.categories if key_of(category.id) not in roots]
        new_labels = {label: kept.index(self.categories[label]) for label in used}
        self._check_units()
        self.rows.sort(key=lambda row: row[0])
        return CocoAnnotations(
            path=self.path,
            images=self.images,
            categories=tuple(_distinct_names(kept, self.path)),
            places=np.array([row[0] for row in self.rows], np.int64),
            labels=np.array([new_labels[row[1]] for row in self.rows], np.int64),
            boxes=np.array([row[2] for row in self.rows], np.float64).reshape(-1, 4),
            areas=np.array([row[3] for row in self.rows], np.float64),
            crowd=np.array([row[4] for row in self.rows], np.bool_),
            left_out=LeftOut(
                bad_boxes=self.counts["bad_boxes"],
                repeated_images=repeated_images,
                merged_images=len(self.merged),
                repeated_annotations=self.counts["repeated_annotations"],
                annotations_without_image=self.counts["annotations_without_image"],
                root_categories=tuple(category.name for category in self.categories if category not in kept),
            ),
            doubtful=frozenset(self.doubtful),
        )

    def _check_units(self) -> None:
        """ValueError where the boxes as a whole are not x, y, width and height in pixels."""
        if not self.rows:
            return
        boxes = np.array([row[2] for row in self.rows])
        ends = boxes[:, :2] + boxes[:, 2:]
        if (ends <= 1).all():
            raise ValueError(
                f"{self.path}: every box ends within the first pixel: they look like fractions of the image, and COCO's"
                " are pixels"
            )
        sides = np.array([(self.images[row[0]].width, self.images[row[0]].height) for row in self.rows])
        outside = (ends > sides + 1).any(axis=1).mean()
        corners = ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sides + 1)).all()
        if corners and outside > MOST_OUTSIDE:
            told = (
                f"{self.path}: {outside:.0%} of the boxes reach out of their images, and all fit as corners: they look"
                " like x1, y1, x2, y2, and COCO's are x, y, width, height"
            )
            if len(boxes) >= FEWEST_TO_JUDGE:
                raise ValueError(told)
            logger.warning("%s; read as these, since so few boxes prove nothing", told)

    def _flag(self, entry: Mapping[str, Any], name: str, index: int) -> bool:
        value = entry.get(name)
        if value is None or value in (0, 1):
            return bool(value)
        raise ValueError(f"{self.path}: annotations[{index}] has {name} {value!r}; it must be 0 or 1")

    def _add(self, place: int, label: int, entry: Mapping[str, Any], crowd: bool) -> None:
        image = self.images[place]
        box = _box(entry.get("bbox"), image)
        if box is None:
            self.counts["bad_boxes"] += 1
            self.doubtful.add(place)
            return
        # The same id alone proves nothing: tools start anew with every image. Of a picture under two ids, each may list
        # every object.
        identifier, merged = entry.get("id"), place in self.merged
        if merged or identifier is not None:
            content = (None if merged else repr(identifier), place, label, box)
            if content in self.seen:
                self.counts["repeated_annotations"] += 1
                return
            self.seen.add(content)
        self.rows.append((place, label, box, _area(entry.get("area"), box, image), crowd))


def _box(value: Any, image: CocoImage) -> tuple[float, float, float, float] | None:
    """COCO's ``(x, y, width, height)``, or None when nothing of it is in the image."""
    if not isinstance(value, list) or len(value) != 4 or not all(_is_finite(number) for number in value):
        return None
    x, y, width, height = (float(number) for number in value)
    inside = min(
        min(x + width, image.width) - max(x, 0),
        min(y + height, image.height) - max(y, 0),
    )
    huge = max(map(abs, (x, y, width, height))) > LARGEST_NUMBER
    return None if inside < SMALLEST_EXTENT or huge else (x, y, width, height)


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floating-point numbers
        return False


def _area(value: Any, box: tuple[float, float, float, float], image: CocoImage) -> float:
    """The stated area, in pixels, or the box's where that cannot be the area of something in the image."""
    if _is_finite(value) and 0 < value <= image.width * image.height:
        return float(value)
    return min(box[2] * box[3], float(image.width * image.height))


def _root_categories(entries: Sequence[Mapping[str, Any]], used: Sequence[str]) -> set[str]:
    """Ids of categories that only group the others: without objects or a group of their own, and named as theirs."""
    groups = {key_of(entry["id"]): entry.get("supercategory") for entry in entries}
    names = {key_of(entry["id"]): entry["name"] for entry in entries}
    return {
        key
        for key, name in names.items()
        if key not in used
        and groups[key] in (None, "", "none")
        and len(groups) > 1
        and all(group == name for other, group in groups.items() if other != key)
    }


def _distinct_names(categories: Sequence[CocoCategory], path: Path) -> Sequence[CocoCategory]:
    """The categories; ValueError where two have one name, since names tell classes apart."""
    by_name: dict[str, CocoCategory] = {}
    for category in categories:
        first = by_name.setdefault(name_key(category.name), category)
        if first is not category:
            raise ValueError(f"{path}: the categories {first.id} and {category.id} are both named {category.name!r}")
    return categories
