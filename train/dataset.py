"""Images and boxes of a dataset, for training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from asag.runtime.coco_dataset import CocoFolder, check_size, clipped_boxes, missing_files, remedy_of_missing
from asag.runtime.coco_file import CocoAnnotations, LeftOut, left_out_sentence
from asag.runtime.layouts.find import find_split
from asag.runtime.layouts.split import LostPictures
from asag.runtime.preprocessing import load_image
from asag.training.protocol import Target

logger = logging.getLogger(__name__)

SHORTEST_SIDE = 32
"""Images with a side under this many pixels are left out of training."""


@dataclass(frozen=True)
class DatasetCounts:
    """What an annotation file held and what was left out of training."""

    images: int
    objects: int
    images_without_objects: int = 0
    small_images: int = 0
    crowd_annotations: int = 0
    missing_images: int = 0
    background_images: int = 0
    """Of the images, those without objects."""
    of_file: LeftOut = field(default_factory=LeftOut)
    """What no reader of the file counts."""

    @property
    def wrong(self) -> bool:
        """Whether something was left out that is a mistake in the file or the folder."""
        return self.of_file.wrong or bool(self.missing_images)

    def sentence(self) -> str:
        """One line for a person."""
        left_out = {
            "images without objects": self.images_without_objects,
            f"images with a side under {SHORTEST_SIDE} pixels": self.small_images,
            "crowd annotations": self.crowd_annotations,
            **self.of_file.reasons,
            "images whose file is missing": self.missing_images,
        }
        return f"{self.kept()}{left_out_sentence(left_out)}"

    def kept(self) -> str:
        """What is trained on, for a person."""
        background = f" and {self.background_images} of them without" if self.background_images else ""
        return f"{self.images} images with {self.objects} objects{background}"


class DetectionDataset(Dataset[tuple[Image.Image, Target]]):
    """The training images of a data set: those that have objects and, with `background_images`, those without any.

    ``dataset[i]`` is the RGB picture and its target: boxes ``xyxy`` in pixels of the picture, clipped to it, and class
    indices in the order of the rising category ids. ``category_ids`` and ``category_names`` follow from the file. Left
    out, beside what :mod:`runtime.coco_file` leaves out: crowd annotations, images without objects, and images with a
    side under 32 pixels; ``counts`` tells how many, and one log line reports it. With `skip_missing` so are images
    whose file is missing; `without_size` more are left out of the annotations for that. With `stored_pixels` pictures
    are read without regard to their EXIF orientation. An image whose only objects are to be ignored, or have bad
    boxes, is no background.

    Raises FileNotFoundError when the annotation file or an image is missing, and ValueError when the file is not one
    of COCO's kind or when nothing remains to train on.
    """

    def __init__(
        self,
        images_dir: str | Path,
        annotation_file: str | Path | CocoAnnotations,
        skip_missing: bool = False,
        stored_pixels: bool = False,
        background_images: bool = False,
        *,
        without_size: int = 0,
    ) -> None:
        folder = CocoFolder(images_dir, annotation_file, stored_pixels)
        self.images_dir, self.annotation_file = folder.images_dir, folder.annotations_path
        self.category_ids, self.category_names = folder.category_ids, folder.category_names
        self.stored_pixels = stored_pixels
        annotations = folder.annotations
        objects = [np.flatnonzero(~annotations.crowd[held]) + held.start for held in map(folder.objects, folder.images)]
        large = [min(image.height, image.width) >= SHORTEST_SIDE for image in annotations.images]
        annotated = {*annotations.places.tolist(), *annotations.doubtful}
        wanted = [
            place
            for place, found in enumerate(objects)
            if large[place] and (len(found) or (background_images and place not in annotated))
        ]
        missing = self._missing([annotations.images[place].file_name for place in wanted], skip_missing)
        kept = [place for place in wanted if annotations.images[place].file_name not in missing]
        # Only flat arrays are kept: worker processes share them, where many small objects would be copied by and by.
        self._files = [annotations.images[place].file_name for place in kept]
        self._sizes = [(annotations.images[place].height, annotations.images[place].width) for place in kept]
        boxes = [
            clipped_boxes(annotations.boxes[objects[place]], *size)
            for place, size in zip(kept, self._sizes, strict=True)
        ]
        self._boxes = np.concatenate([np.zeros((0, 4)), *boxes]).astype(np.float32)
        self._labels = np.concatenate([np.zeros(0, np.int64), *(annotations.labels[objects[place]] for place in kept)])
        self._starts = np.cumsum([0, *(len(objects[place]) for place in kept)]).tolist()
        self.counts = DatasetCounts(
            images=len(self._files),
            objects=len(self._labels),
            images_without_objects=sum(large) - len(wanted),
            background_images=sum(not len(objects[place]) for place in kept),
            small_images=len(large) - sum(large),
            crowd_annotations=int(annotations.crowd.sum()),
            missing_images=len(missing) + without_size,
            of_file=annotations.left_out,
        )
        if not len(self._labels):
            raise ValueError(f"{self.annotation_file} has nothing to train on: {self.counts.sentence()}")
        folder.check_sizes([annotations.images[place].id for place in kept])
        level = logging.WARNING if self.counts.wrong else logging.INFO
        logger.log(level, "%s: %s", self.annotation_file, self.counts.sentence())

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        path = self.images_dir / self._files[index]
        image = load_image(path, self.stored_pixels)
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
        missing = missing_files(self.images_dir, names)
        if missing and not skip:
            raise _are_missing(missing, self.annotation_file, self.images_dir)
        return set(missing)

    def _check_size(self, index: int, size: tuple[int, int]) -> None:
        """ValueError unless a picture's (width, height) is the annotated one."""
        height, width = self._sizes[index]
        path = self.images_dir / self._files[index]
        check_size(path, size, (width, height), self.annotation_file, self.stored_pixels)


def _are_missing(names: Sequence[str], annotations: Path, folder: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{len(names)} images of {annotations} are missing in {folder}, the first is {names[0]}:"
        f" {remedy_of_missing(folder, names[0])}; --set skip_missing_images=true trains without them"
    )


def open_training_split(
    data: str | Path,
    split: str = "train2017",
    skip_missing: bool = False,
    stored_pixels: bool = False,
    background_images: bool = False,
) -> DetectionDataset:
    """The split of a data set in any known layout; see :func:`runtime.layouts.find.find_split`."""
    found = find_split(data, split)
    lost = LostPictures()
    annotations = found.read(stored_pixels, lost)
    if lost.unreadable:
        raise ValueError(next(iter(lost.unreadable.values())))
    if lost.missing and not skip_missing:
        raise _are_missing(lost.missing, found.annotations, found.images)
    return DetectionDataset(
        found.images, annotations, skip_missing, stored_pixels, background_images, without_size=len(lost.missing)
    )
