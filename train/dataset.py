"""Images and boxes of a dataset in COCO's layout, for training."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from runtime.preprocessing import load_image

logger = logging.getLogger(__name__)

_FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "categories": {"id": int, "name": str},
    "annotations": {"image_id": int, "category_id": int},
}

SHORTEST_SIDE = 32
"""Images with a side under this many pixels are left out (specification section 7)."""


Target = dict[str, torch.Tensor]
"""Objects of one image: `boxes` [n, 4] float32, `labels` [n] int64 class indices."""


@dataclass(frozen=True)
class DatasetCounts:
    """What an annotation file held and what was left out of training."""

    images: int
    objects: int
    images_without_objects: int = 0
    small_images: int = 0
    crowd_annotations: int = 0
    bad_boxes: int = 0

    def sentence(self) -> str:
        """One line for a person."""
        left_out = {
            "images without objects": self.images_without_objects,
            f"images with a side under {SHORTEST_SIDE} pixels": self.small_images,
            "crowd annotations": self.crowd_annotations,
            "bad boxes (empty, outside the image or not numbers)": self.bad_boxes,
        }
        parts = [f"{count} {name}" for name, count in left_out.items() if count]
        ending = f"; left out: {', '.join(parts)}" if parts else ""
        return f"{self.images} images with {self.objects} objects{ending}"


class DetectionDataset(Dataset[tuple[Image.Image, Target]]):
    """The training images of one COCO annotation file that have objects.

    ``dataset[i]`` is the RGB picture and its target: boxes ``xyxy`` in pixels of the picture, clipped to it, and class
    indices in the order of the rising category ids. ``category_ids`` and ``category_names`` follow from the file. Left
    out: crowd annotations, boxes that are empty, outside or not numbers, images without objects, and images with a
    side under 32 pixels; ``counts`` tells how many, and one log line reports it.

    Raises FileNotFoundError when the annotation file or an image is missing, and ValueError when the file is not one
    of COCO's kind, or when nothing remains to train on.
    """

    def __init__(self, images_dir: str | Path, annotation_file: str | Path) -> None:
        self.images_dir, self.annotation_file = Path(images_dir), Path(annotation_file)
        content = _read_annotations(self.annotation_file)
        names = _categories(content, self.annotation_file)
        self.category_ids: tuple[int, ...] = tuple(sorted(names))
        self.category_names: tuple[str, ...] = tuple(names[key] for key in self.category_ids)
        objects, crowd, bad = _objects_by_image(content, self.category_ids, self.annotation_file)
        large = [image for image in content["images"] if min(image["height"], image["width"]) >= SHORTEST_SIDE]
        # Only flat arrays are kept: worker processes share them, where many small objects would be copied by and by.
        self._files: list[str] = []
        self._sizes: list[tuple[int, int]] = []
        boxes: list[tuple[float, ...]] = []
        labels: list[int] = []
        starts = [0]
        for image in large:
            found = objects.get(image["id"])
            if not found:
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
            images_without_objects=len(large) - len(self._files),
            small_images=len(content["images"]) - len(large),
            crowd_annotations=crowd,
            bad_boxes=bad,
        )
        if not self._files:
            raise ValueError(f"{self.annotation_file} has nothing to train on: {self.counts.sentence()}")
        self._check_files()
        logger.info("%s: %s", self.annotation_file.name, self.counts.sentence())
        if bad:
            logger.warning("%s: left out %d bad boxes (empty, outside, not numbers)", self.annotation_file, bad)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        path = self.images_dir / self._files[index]
        image = load_image(path)
        height, width = self._sizes[index]
        if image.size != (width, height):
            raise ValueError(
                f"{path} is {image.width} x {image.height} pixels, but {self.annotation_file.name} says"
                f" {width} x {height}: the annotations belong to another picture"
            )
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

    def _check_files(self) -> None:
        """Raise FileNotFoundError for missing images now, not hours later."""
        if not self.images_dir.is_dir():
            raise FileNotFoundError(f"no folder {self.images_dir} with the images of {self.annotation_file}")
        present = {entry.name for entry in self.images_dir.iterdir()}
        missing = [name for name in self._files if name not in present and not (self.images_dir / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} images of {self.annotation_file} are missing in {self.images_dir},"
                f" the first is {missing[0]}"
            )


def open_training_split(data: str | Path, split: str = "train2017") -> DetectionDataset:
    """The split of a dataset folder in COCO's layout: ``annotations/instances_<split>.json`` and ``<split>/``.

    Raises FileNotFoundError naming what was looked for.
    """
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"no dataset folder {root}")
    annotation_file = root / "annotations" / f"instances_{split}.json"
    if not annotation_file.is_file():
        raise FileNotFoundError(f"{root} is not a dataset in COCO's layout with a split {split}: no {annotation_file}")
    return DetectionDataset(root / split, annotation_file)


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


def _objects_by_image(
    content: dict[str, Any], category_ids: tuple[int, ...], path: Path
) -> tuple[dict[Any, list[tuple[tuple[float, ...], int]]], int, int]:
    """Clipped boxes ``xyxy`` with class indices by image id, and the numbers of crowd annotations and of bad boxes."""
    index_of = {category_id: index for index, category_id in enumerate(category_ids)}
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    if len(sizes) != len(content["images"]):
        raise ValueError(f"{path}: an image id is used twice")
    objects: dict[Any, list[tuple[tuple[float, ...], int]]] = {}
    crowd = bad = 0
    for annotation in content["annotations"]:
        if annotation.get("iscrowd", 0):
            crowd += 1
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
            bad += 1
            continue
        objects.setdefault(annotation["image_id"], []).append((box, index_of[category_id]))
    return objects, crowd, bad


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
