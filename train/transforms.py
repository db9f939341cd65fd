"""Augmentation and batches of training images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional

from asag.runtime.preprocessing import resize, resized_size
from asag.training.protocol import Target

PADDING_MULTIPLE = 32
"""Sides of a batch are rounded up to this many pixels, the stride of the coarsest map."""


class Sample(NamedTuple):
    """One augmented image: `pixels` uint8 [3, h, w]; `boxes` normalized ``cxcywh`` [n, 4]; `labels` int64 [n]."""

    pixels: Tensor
    boxes: Tensor
    labels: Tensor


class Batch(NamedTuple):
    """Images of a step, zero-padded at the bottom and right.

    `images` uint8 [B, 3, H, W]; `sizes` float32 [B, 2] (height, width of the content in pixels); `targets` with boxes
    as normalized ``cxcywh`` over the image's own content.
    """

    images: Tensor
    sizes: Tensor
    targets: list[Target]


@dataclass(frozen=True)
class RandomCrop:
    """With chance `probability`: a resize of the shorter side to one of `shorter_sides`, then a crop with sides drawn
    from `sides` (shortest, longest), both in pixels.

    Objects outside the crop are left out, the others clipped to it.
    """

    probability: float = 0.5
    shorter_sides: tuple[int, ...] = (400, 500, 600)
    sides: tuple[int, int] = (384, 600)

    def __call__(
        self, image: Image.Image, target: Target, generator: np.random.Generator, interpolation: str = "antialias"
    ) -> tuple[Image.Image, Target]:
        """`image` RGB; `target` with boxes ``xyxy`` in its pixels."""
        if generator.random() >= self.probability:
            return image, target
        shorter_side = self.shorter_sides[int(generator.integers(len(self.shorter_sides)))]
        full = resized_size(image.height, image.width, shorter_side, sys.maxsize)
        height, width = (
            int(generator.integers(min(self.sides[0], side), min(self.sides[1], side), endpoint=True)) for side in full
        )
        top, left = (
            int(generator.integers(side - part, endpoint=True))
            for side, part in zip(full, (height, width), strict=True)
        )
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(image.height, image.width))
        boxes = functional.crop(functional.resize(boxes, list(full)), top, left, height, width)
        boxes = functional.clamp_bounding_boxes(boxes).as_subclass(Tensor)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        picture = functional.crop(resize(image, full, interpolation), top, left, height, width)
        return picture, Target(boxes=boxes[inside], labels=target["labels"][inside])


@dataclass(frozen=True)
class TrainingTransform:
    """Random crop where there is one, random horizontal flip, then the resize of all images to one of
    `shorter_sides`, drawn at random.

    Pixels are resized by the same function as for inference. Only the passed generator decides: a generator in the
    same state gives the same sample.
    """

    shorter_sides: tuple[int, ...]
    longer_side: int
    flip_probability: float = 0.5
    crop: RandomCrop | None = None
    interpolation: str = "antialias"

    def __call__(self, image: Image.Image, target: Target, generator: np.random.Generator) -> Sample:
        """`image` RGB; `target` with boxes ``xyxy`` in its pixels."""
        if self.crop is not None:
            image, target = self.crop(image, target, generator, self.interpolation)
        size = (image.height, image.width)
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        if generator.random() < self.flip_probability:
            image = functional.horizontal_flip(image)
            boxes = functional.horizontal_flip(boxes)
        shorter_side = self.shorter_sides[int(generator.integers(len(self.shorter_sides)))]
        resized = resize(image, resized_size(*size, shorter_side, self.longer_side), self.interpolation)
        extent = torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float32)
        normalized = box_convert(boxes.as_subclass(Tensor) / extent, "xyxy", "cxcywh")
        return Sample(torch.from_numpy(np.asarray(resized).transpose(2, 0, 1).copy()), normalized, target["labels"])


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad samples with zeros to one size whose sides are multiples of 32 pixels. Raises ValueError without samples."""
    if not samples:
        raise ValueError("a batch needs at least one image")
    sizes = [sample.pixels.shape[1:] for sample in samples]
    height, width = (-(-max(side) // PADDING_MULTIPLE) * PADDING_MULTIPLE for side in zip(*sizes, strict=True))
    images = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8)
    for index, sample in enumerate(samples):
        images[index, :, : sizes[index][0], : sizes[index][1]] = sample.pixels
    targets = [Target(boxes=sample.boxes, labels=sample.labels) for sample in samples]
    return Batch(images, torch.tensor(sizes, dtype=torch.float32), targets)
