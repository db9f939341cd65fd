"""Images and boxes of a dataset in COCO's layout, for training."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image
from torch.utils.data import Dataset

from asag.training.protocol import Target
from runtime.preprocessing import load_image

logger = logging.getLogger(__name__)

_Value = TypeVar("_Value")

_FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "categories": {"id": int, "name": str},
    "annotations": {"image_id": int, "category_id": int},
}

SHORTEST_SIDE = 32
"""Images with a side under this many pixels are left out of training."""


MOST_CHECKED_SIZES = 2000
"""So many pictures' sizes are compared with the annotations' before training."""
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


@dataclass(frozen=True)
class DatasetCounts:
    """What an annotation file held and what was left out of training."""

    images: int
    objects: int
    images_without_objects: int = 0
    small_images: int = 0
    crowd_annotations: int = 0
    bad_boxes: int = 0
    repeated_images: int = 0
    repeated_annotations: int = 0
    missing_images: int = 0

    @property
    def wrong(self) -> bool:
        """Whether something was left out that is a mistake in the file or the folder."""
        return bool(self.bad_boxes or self.repeated_images or self.repeated_annotations or self.missing_images)

    def sentence(self) -> str:
        """One line for a person."""
        left_out = {
            "images without objects": self.images_without_objects,
            f"images with a side under {SHORTEST_SIDE} pixels": self.small_images,
            "crowd annotations": self.crowd_annotations,
            "bad boxes (empty, outside the image or not numbers)": self.bad_boxes,
            "images listed twice": self.repeated_images,
            "annotations whose id is taken": self.repeated_annotations,
            "images whose file is missing": self.missing_images,
        }
        parts = [f"{count} {name}" for name, count in left_out.items() if count]
        ending = f"; left out: {', '.join(parts)}" if parts else ""
        return f"{self.images} images with {self.objects} objects{ending}"


class DetectionDataset(Dataset[tuple[Image.Image, Target]]):
    """The training images of one COCO annotation file that have objects.

    ``dataset[i]`` is the RGB picture and its target: boxes ``xyxy`` in pixels of the picture, clipped to it, and class
    indices in the order of the rising category ids. ``category_ids`` and ``category_names`` follow from the file. Left
    out: crowd annotations, boxes that are empty, outside or not numbers, images without objects, images with a side
    under 32 pixels, entries that repeat an image, and annotations whose id an earlier one has; ``counts`` tells how
    many, and one log line reports it. With `skip_missing` so are images whose file is missing.

    Raises FileNotFoundError when the annotation file or an image is missing, and ValueError when the file is not one
    of COCO's kind, when two images share an id, or when nothing remains to train on.
    """

    def __init__(self, images_dir: str | Path, annotation_file: str | Path, skip_missing: bool = False) -> None:
        self.images_dir, self.annotation_file = Path(images_dir), Path(annotation_file)
        content = _read_annotations(self.annotation_file)
        names = _categories(content, self.annotation_file)
        self.category_ids: tuple[int, ...] = tuple(sorted(names))
        self.category_names: tuple[str, ...] = tuple(names[key] for key in self.category_ids)
        listed = len(content["images"])
        content["images"] = _distinct_images(content["images"], self.annotation_file)
        repeated_images = listed - len(content["images"])
        found_objects = _objects_by_image(content, self.category_ids, self.annotation_file)
        objects = found_objects.by_image
        large = [image for image in content["images"] if min(image["height"], image["width"]) >= SHORTEST_SIDE]
        # Only flat arrays are kept: worker processes share them, where many small objects would be copied by and by.
        self._files: list[str] = []
        self._sizes: list[tuple[int, int]] = []
        boxes: list[tuple[float, ...]] = []
        labels: list[int] = []
        starts = [0]
        with_objects = [image for image in large if objects.get(image["id"])]
        missing = self._missing([image["file_name"] for image in with_objects], skip_missing)
        for image in with_objects:
            found = objects[image["id"]]
            if image["file_name"] in missing:
                continue
            self._files.append(image["file_name"])
            self._sizes.append((image["height"], image["width"]))
            boxes.extend(box for box, _ in found)
            labels.extend(label for _, label in found)
            starts.append(len(boxes))
        self._boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        self._labels = np.asarray(labels, dtype=np.int64)
        self._starts = starts
        self.counts = DatasetCounts(
            images=len(self._files),
            objects=len(self._labels),
            images_without_objects=len(large) - len(with_objects),
            small_images=len(content["images"]) - len(large),
            crowd_annotations=found_objects.crowd,
            bad_boxes=found_objects.bad,
            repeated_images=repeated_images,
            repeated_annotations=found_objects.repeated,
            missing_images=len(missing),
        )
        if not self._files:
            raise ValueError(f"{self.annotation_file} has nothing to train on: {self.counts.sentence()}")
        self._check_sizes()
        level = logging.WARNING if self.counts.wrong else logging.INFO
        logger.log(level, "%s: %s", self.annotation_file, self.counts.sentence())

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        path = self.images_dir / self._files[index]
        image = load_image(path)
        self._check_size(index, image.size)
        objects = slice(self._starts[index], self._starts[index + 1])
        return image, Target(
            boxes=torch.from_numpy(self._boxes[objects].copy()), labels=torch.from_numpy(self._labels[objects].copy())
        )

    def file_name(self, index: int) -> str:
        """File name of an image, relative to the images' folder."""
        return self._files[index]

    def image_size(self, index: int) -> tuple[int, int]:
        """(height, width) of an image in pixels."""
        return self._sizes[index]

    def _missing(self, names: list[str], skip: bool) -> set[str]:
        """The images whose file is missing, now, not hours later; FileNotFoundError unless they are to be skipped."""
        if not self.images_dir.is_dir():
            raise FileNotFoundError(f"no folder {self.images_dir} with the images of {self.annotation_file}")
        missing = missing_files(self.images_dir, names)
        if missing and not skip:
            raise FileNotFoundError(
                f"{len(missing)} images of {self.annotation_file} are missing in {self.images_dir}, the first is"
                f" {missing[0]}; --set skip_missing_images=true trains without them"
            )
        return set(missing)

    def _check_sizes(self) -> None:
        """Compare the sizes that the file states with the pictures', of all or, of many, evenly spread ones.

        Only headers are read. Pictures that cannot be read are left for the loader to name.
        """
        for index in spread(range(len(self)), MOST_CHECKED_SIZES):
            try:
                size = upright_size(self.images_dir / self._files[index])
            except (OSError, SyntaxError, ValueError):
                continue
            self._check_size(index, size)

    def _check_size(self, index: int, size: tuple[int, int]) -> None:
        """ValueError unless a picture's (width, height) is the annotated one."""
        height, width = self._sizes[index]
        if size != (width, height):
            raise ValueError(
                f"{self.images_dir / self._files[index]} is {size[0]} x {size[1]} pixels, but"
                f" {self.annotation_file.name} says {width} x {height}: the annotations belong to another picture"
            )


def missing_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of the names, relative to the folder, that are no files there. The folder is listed once: that is faster
    than asking for each of many thousands."""
    present = {entry.name for entry in folder.iterdir()}
    return [name for name in names if name not in present and not (folder / name).is_file()]


def spread(values: Sequence[_Value], most: int) -> Sequence[_Value]:
    """All values or, of many, about `most` of them, evenly spread."""
    return values[:: max(1, len(values) // most)]


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture as it is shown; only its header is read. Raises what Pillow raises."""
    with Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED
        return (image.height, image.width) if turned else image.size


def open_training_split(data: str | Path, split: str = "train2017", skip_missing: bool = False) -> DetectionDataset:
    """The split of a dataset folder in COCO's layout: ``annotations/instances_<split>.json`` and ``<split>/``.

    Raises FileNotFoundError naming what was looked for.
    """
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"no dataset folder {root}")
    annotation_file = root / "annotations" / f"instances_{split}.json"
    if not annotation_file.is_file():
        raise FileNotFoundError(f"{root} is not a dataset in COCO's layout with a split {split}: no {annotation_file}")
    return DetectionDataset(root / split, annotation_file, skip_missing)


def _read_annotations(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"annotation file not found: {path}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} as JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} is not a COCO annotation file: it has no list {key!r}")
    for key, fields in _FIELDS.items():
        for position, entry in enumerate(content[key]):
            good = isinstance(entry, Mapping)
            wrong = [name for name, kind in fields.items() if not good or not isinstance(entry.get(name), kind)]
            if wrong or not good:
                raise ValueError(f"{path}: entry {position} of {key!r} has no proper {', '.join(wrong) or 'content'}")
    return content


def _categories(content: dict[str, Any], path: Path) -> dict[int, str]:
    names = {category["id"]: category["name"] for category in content["categories"]}
    if not names:
        raise ValueError(f"{path} names no categories")
    if len(names) != len(content["categories"]):
        raise ValueError(f"{path}: a category id is used twice")
    return names


def _distinct_images(images: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The images without entries that repeat another. ValueError when different images share an id."""
    by_id: dict[int, dict[str, Any]] = {}
    clashes = []
    for image in images:
        first = by_id.setdefault(image["id"], image)
        if any(first[name] != image[name] for name in ("file_name", "height", "width")):
            clashes.append(image["id"])
    if clashes:
        raise ValueError(
            f"{path}: an image id is used twice, in {len(clashes)} cases; the first is {clashes[0]}, so nobody can"
            " tell whose its boxes are: number the images anew"
        )
    return list(by_id.values())


@dataclass
class _Objects:
    """Clipped boxes ``xyxy`` with class indices by image id, and how many annotations were left out, and why."""

    by_image: dict[int, list[tuple[tuple[float, ...], int]]] = field(default_factory=dict)
    crowd: int = 0
    bad: int = 0
    repeated: int = 0


def _objects_by_image(content: dict[str, Any], category_ids: tuple[int, ...], path: Path) -> _Objects:
    index_of = {category_id: index for index, category_id in enumerate(category_ids)}
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    found = _Objects()
    ids: set[Any] = set()
    for annotation in content["annotations"]:
        identifier = annotation.get("id")
        if isinstance(identifier, int | str):
            if identifier in ids:
                found.repeated += 1
                continue
            ids.add(identifier)
        if annotation.get("iscrowd") or annotation.get("ignore"):
            found.crowd += 1
            continue
        category_id = annotation["category_id"]
        if category_id not in index_of:
            raise ValueError(f"{path}: annotation {annotation.get('id')} has an unknown category {category_id}")
        # Annotations of images that the file leaves out are common in subsets of a dataset, and harmless.
        size = sizes.get(annotation["image_id"])
        if size is None:
            continue
        box = _clipped_box(annotation.get("bbox"), *size)
        if box is None:
            found.bad += 1
            continue
        found.by_image.setdefault(annotation["image_id"], []).append((box, index_of[category_id]))
    return found


def _clipped_box(box: Any, height: float, width: float) -> tuple[float, float, float, float] | None:
    """COCO's ``(x, y, width, height)`` as ``xyxy`` clipped to the image, or None when nothing of it is there."""
    if not isinstance(box, list | tuple) or len(box) != 4:
        return None
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in box):
        return None
    x, y, box_width, box_height = box
    if box_width <= 0 or box_height <= 0:
        return None
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + box_width, width), min(y + box_height, height)
    return (left, top, right, bottom) if right > left and bottom > top else None
