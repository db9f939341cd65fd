"""Where the anchor generator looks while it trains (specification section 7, "Patches").

Corners are cells (x, y) of the level's map, int64; boxes and content sizes are pixels of the resized image. All is
drawn and computed on the CPU and stays there: a few dozen boxes per image, and the same seed gives the same patches on
every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert, nms

from asag.families.asag.training.anchor_targets import FLIPS
from asag.ops.adaptive_probing import PATCH_SIDE
from asag.training.randomness import Generators, generator_of

FEWEST_PATCHES = 4
SUPPRESSION_IOU = 0.25


@dataclass(frozen=True)
class TrainingPatches:
    """The patches of one level that a training step predicts, sorted by image; on the CPU.

    ``corners`` [N, 2] int64 (x, y) cells; ``image_index`` [N] int64; ``explored`` [N] bool, False for a patch that
    serves the loss only: its anchors are neither output anchors nor candidates for the next level.
    """

    corners: Tensor
    image_index: Tensor
    explored: Tensor


def four_flips(patches: Tensor) -> Tensor:
    """The four views [B, 4, C, H, W] (identity, horizontal, vertical, both) of patches [B, C, H, W]."""
    views = []
    for horizontal, vertical in FLIPS:
        axes = [axis for axis, mirrored in ((-1, horizontal), (-2, vertical)) if mirrored]
        views.append(patches.flip(axes) if axes else patches)
    return torch.stack(views, 1)


def last_corner(content: Sequence[float], stride: int) -> Tensor:
    """The furthest top-left cell (x, y) [2] int64 from which a patch ends within ``content`` (height, width) pixels.

    0 along a side that is shorter than a patch.
    """
    height, width = (max(math.ceil(float(side) / stride) - PATCH_SIDE, 0) for side in content)
    return torch.tensor([width, height])


def ground_truth_corners(
    boxes_xyxy: Tensor, content: Sequence[float], stride: int, generator: torch.Generator | None = None
) -> Tensor:
    """Patches around the small objects of one image: corners [m, 2] int64, the preferred ones first.

    ``boxes_xyxy`` [n, 4] float pixels; ``content`` (height, width) pixels. Objects under half a patch on both sides
    count; of those that overlap (IoU over 0.25), the ones nearest to all the others stay. A patch starts at its
    object's top-left cell, is moved to end within the content, and then left and up by a random number of cells, as
    many as still leave the object inside.
    """
    boxes = boxes_xyxy.detach().cpu().float()
    boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) < PATCH_SIDE * stride / 2).all(1)]
    if not len(boxes):
        return torch.empty(0, 2, dtype=torch.int64)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    spread = (centres[:, None] - centres).square().sum((1, 2))
    boxes = boxes[nms(boxes, -spread, SUPPRESSION_IOU)]
    start = (boxes[:, :2] / stride).floor().long().clamp(min=0)
    start = torch.minimum(start, last_corner(content, stride))
    end = (boxes[:, 2:] / stride).ceil().long()
    room = torch.minimum(start, start + PATCH_SIDE - end).clamp(min=0)
    return start - _random_cells(room, generator)


def random_corners(
    count: int, content: Sequence[float], stride: int, generator: torch.Generator | None = None
) -> Tensor:
    """``count`` patches anywhere within ``content`` (height, width) pixels: corners [count, 2] int64."""
    return _random_cells(last_corner(content, stride).expand(count, 2), generator)


def top_up_corners(
    predicted: int,
    boxes_xyxy: Tensor,
    content: Sequence[float],
    stride: int,
    generator: torch.Generator | None = None,
    fewest: int = FEWEST_PATCHES,
) -> Tensor:
    """The patches to add where ``predicted`` are fewer than ``fewest``: corners [max(fewest - predicted, 0), 2] int64.

    Ground-truth patches first (see `ground_truth_corners`), random ones for what is still missing.
    """
    missing = fewest - predicted
    if missing <= 0:
        return torch.empty(0, 2, dtype=torch.int64)
    known = ground_truth_corners(boxes_xyxy, content, stride, generator)[:missing]
    return torch.cat([known, random_corners(missing - len(known), content, stride, generator)])


def training_patches(
    corners: Tensor,
    image_index: Tensor,
    boxes: Sequence[Tensor],
    image_sizes: Tensor,
    stride: int,
    epoch: int,
    generator: Generators = None,
    most: int | None = None,
) -> TrainingPatches:
    """The patches of one level for a training step of ``epoch`` (from 0).

    ``corners`` [N, 2] and ``image_index`` [N] are the predicted patches, ``boxes`` per image [n, 4] the objects
    (``cxcywh``, fractions of the content), ``image_sizes`` [B, 2] the contents' (height, width) in pixels. Epoch 0
    explores ground-truth patches alone, at most ``most`` of an image; later epochs explore the predicted ones and
    top up images that have few. ``generator``: one for all images, or one for each.
    """
    predicted, owner = corners.cpu(), image_index.cpu()
    contents = image_sizes.cpu().tolist()
    parts, explored, owners = [], [], []
    for image, (fractions, content) in enumerate(zip(boxes, contents, strict=True)):
        height, width = content
        pixels = box_convert(fractions.cpu() * torch.tensor([width, height, width, height]), "cxcywh", "xyxy")
        if epoch == 0:
            first = ground_truth_corners(pixels, content, stride, generator_of(generator, image))[:most]
            added = first[:0]
        else:
            first = predicted[owner == image]
            added = top_up_corners(len(first), pixels, content, stride, generator_of(generator, image))
        parts += [first, added]
        explored += [torch.ones(len(first), dtype=torch.bool), torch.zeros(len(added), dtype=torch.bool)]
        owners.append(torch.full((len(first) + len(added),), image))
    return TrainingPatches(torch.cat(parts), torch.cat(owners), torch.cat(explored))


def _random_cells(most: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform int64 numbers from 0 to ``most`` inclusive, of its shape."""
    device = generator.device if generator is not None else None
    part = torch.rand(most.shape, generator=generator, device=device).cpu()
    # Rounding can lift the product to the excluded end.
    return torch.minimum((part * (most + 1)).floor().long(), most)
