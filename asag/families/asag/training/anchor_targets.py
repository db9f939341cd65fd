"""Which objects a patch of the anchor generator owns, in the patch's own coordinates.

A patch owns the objects whose centre lies in it (its left and top edge belong to it, its right and bottom edge do
not, so that neighbouring quarters share no object), clipped to the patch and given as `cxcywh` fractions of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asag.families.asag.training.matching import TargetGroups, coarse_area_factor, object_area_factor
from asag.ops.adaptive_probing import PATCH_SIDE
from asag.parts.boxes import content_scale, cxcywh_to_xyxy
from asag.training.transfer import to_device

FLIPS = ((False, False), (True, False), (False, True), (True, True))
"""The views of the P6 patch, each (mirrored left-right, mirrored top-bottom): identity, horizontal, vertical, both."""
QUARTERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
"""Top-left corners (x, y) of the P5 quarters in units of a quarter: top left, top right, bottom left, bottom right."""


def flip_boxes(boxes: Tensor) -> Tensor:
    """Mirror `cxcywh` fraction boxes [..., T, 4] into the four views [..., 4, T, 4] of `FLIPS`."""
    x, y, width, height = boxes.unbind(-1)
    views = [
        torch.stack([1 - x if horizontal else x, 1 - y if vertical else y, width, height], -1)
        for horizontal, vertical in FLIPS
    ]
    return torch.stack(views, -3)


def flip_groups(images: TargetGroups) -> TargetGroups:
    """Targets of the four views of each image's P6 patch: B images of T objects -> 4B groups, image-major.

    The patch covers the whole content, so it owns every object; large ones weigh most.
    """
    boxes = flip_boxes(images.boxes).flatten(0, 1)
    valid = images.valid.repeat_interleave(len(FLIPS), 0)
    return _groups(boxes, valid, coarse_area_factor(boxes))


def quarter_groups(images: TargetGroups) -> TargetGroups:
    """Targets of the four P5 quarters of each image: B images of T objects -> 4B groups, image-major."""
    corners = to_device(torch.tensor(QUARTERS), images.boxes.device)[None, :, None]
    size = images.boxes[:, None, :, 2:].expand(-1, len(QUARTERS), -1, -1) * 2
    local = torch.cat([images.boxes[:, None, :, :2] * 2 - corners, size], -1).flatten(0, 1)
    valid = images.valid.repeat_interleave(len(QUARTERS), 0) & _centre_inside(local)
    return _clipped_groups(local, valid)


def patch_groups(
    images: TargetGroups, image_sizes: Tensor, corners: Tensor, image_index: Tensor, strides: Tensor
) -> TargetGroups:
    """Targets of N probed patches of any levels, which own only objects that a patch can hold.

    `image_sizes` [B, 2] (height, width) of the contents in pixels; per patch `corners` [N, 2] its top-left cell
    (x, y), `image_index` [N] and `strides` [N] the pixels of a cell. An object is owned when its centre lies in
    the patch and its sides, before clipping, are at most the patch's.
    """
    pixels = (images.boxes * content_scale(image_sizes.to(images.boxes)))[image_index]
    cell = strides.to(pixels)[:, None, None]
    local = torch.cat([pixels[..., :2] - corners[:, None] * cell, pixels[..., 2:]], -1) / (PATCH_SIDE * cell)
    valid = images.valid[image_index] & _centre_inside(local) & (local[..., 2:] <= 1).all(-1)
    return _clipped_groups(local, valid)


def _centre_inside(local: Tensor) -> Tensor:
    centre = local[..., :2]
    return ((centre >= 0) & (centre < 1)).all(-1)


def _clipped_groups(local: Tensor, valid: Tensor) -> TargetGroups:
    left, top, right, bottom = cxcywh_to_xyxy(local).clamp(0, 1).unbind(-1)
    boxes = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], -1)
    return _groups(boxes, valid, object_area_factor(boxes))


def _groups(boxes: Tensor, valid: Tensor, area_factor: Tensor) -> TargetGroups:
    labels = torch.zeros(valid.shape, dtype=torch.int64, device=boxes.device)
    return TargetGroups(boxes, labels, valid, area_factor)
