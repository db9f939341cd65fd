"""AdaptiveProbing: from one level's anchors to the patches of the next finer map (ASAG's README, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PATCH_SIDE = 15
"""Cells along each side of a patch (ASAG's README, section 3)."""

CONFIDENCE_LOW = 0.1
CONFIDENCE_HIGH = 0.7
"""An anchor asks for a closer look when its confidence is strictly between these."""

SUPPRESSION_IOU = 0.25
"""Two patches may overlap up to this IoU."""


class ProbedPatches(NamedTuple):
    """The result of probing a level with room for K patches per image."""

    patches: Tensor
    """[B, K, 225, C] the cropped cells, row-major; zeros where not valid."""
    corners: Tensor
    """[B, K, 2] int64 (x, y): the top-left cell."""
    valid: Tensor
    """[B, K] bool."""
    candidate: Tensor
    """[B, A] bool: anchors that asked to be explored."""
    overflow: Tensor
    """[B] int32: candidates left unexplored because all K places were taken."""


def probe_candidates(anchors: Tensor, valid: Tensor, stride: int) -> Tensor:
    """Anchors that ask to be explored on the map of `stride`.

    anchors: [B, A, 5] (cx, cy, w, h in pixels, confidence in 0..1); valid: [B, A] bool -> [B, A] bool.
    A NaN confidence is no candidate.
    """
    confidence = anchors[..., 4]
    limit = PATCH_SIDE * stride / 2
    small = (anchors[..., 2] < limit) & (anchors[..., 3] < limit)
    return valid & small & (confidence > CONFIDENCE_LOW) & (confidence < CONFIDENCE_HIGH)


def suppress_squares(
    centres: Tensor, priority: Tensor, side: float, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy non-maximum suppression over equal squares.

    centres: [B, A, 2] pixels; priority: [B, A], negative for squares that do not take part; side: pixels; capacity:
    most survivors per image, or None for as many as there are. Returns the survivors' indices [B, K] int64, whether a
    place holds one [B, K] bool, and how many squares were neither chosen nor suppressed [B] int32. Survivors come in
    falling priority; among equals the first index wins.
    """
    remaining = priority
    position = torch.arange(centres.shape[1], device=centres.device)
    # Looking whether anything is left would make a GPU wait for every round; there, all rounds of a fixed capacity run.
    ends_early = capacity is None or centres.device.type == "cpu"
    chosen: list[Tensor] = []
    taken: list[Tensor] = []
    while capacity is None or len(chosen) < capacity:
        best, index = remaining.max(dim=1, keepdim=True)
        if ends_early and not bool((best > 0).any()):
            break
        centre = centres.gather(1, index.unsqueeze(-1).expand(-1, -1, 2))
        shared = (side - (centres - centre).abs()).clamp(min=0).prod(dim=-1)
        overlaps = shared / (2 * side * side - shared) > SUPPRESSION_IOU
        remaining = remaining.masked_fill(overlaps | (position == index), -1.0)
        chosen.append(index)
        taken.append(best > 0)
    unused = centres.new_zeros((centres.shape[0], 0 if capacity is None else capacity - len(chosen)))
    indices = torch.cat((*chosen, unused.long()), dim=1)
    return indices, torch.cat((*taken, unused.bool()), dim=1), (remaining > 0).sum(dim=1).int()


def crop_patches(feature: Tensor, image_index: Tensor, corners: Tensor) -> Tensor:
    """Cut 15x15 patches out of a map; cells past its end are zeros.

    feature: [B, C, H, W]; image_index: [N] int64; corners: [N, 2] int64 (x, y cells, not negative)
    -> [N, 225, C], row-major. Differentiable in `feature`.
    """
    height, width = feature.shape[-2:]
    offset = torch.arange(PATCH_SIDE, device=feature.device)
    x = corners[:, None, None, 0] + offset
    y = corners[:, None, None, 1] + offset[:, None]
    inside = (x < width) & (y < height)
    cells = (image_index[:, None, None] * height + y.clamp(max=height - 1)) * width + x.clamp(max=width - 1)
    rows = feature.permute(0, 2, 3, 1).flatten(0, 2)
    return (rows[cells] * inside.unsqueeze(-1)).flatten(1, 2)


def adaptive_probing_definition(
    anchors: Tensor, valid: Tensor, feature: Tensor, sizes: Tensor, stride: int, capacity: int | None
) -> ProbedPatches:
    """Choose and crop the patches of the map of `stride` that the coarser level's anchors ask for.

    anchors: [B, A, 5] (cx, cy, w, h in pixels, confidence in 0..1); valid: [B, A] bool;
    feature: [B, C, H, W], the compressed map; sizes: [B, 2] (height, width) of the content in pixels;
    capacity: K, or None for as many places as the fullest image needs.
    """
    candidate = probe_candidates(anchors, valid, stride)
    priority = torch.where(candidate, anchors[..., 4], -1.0)
    centres = anchors[..., :2]
    index, taken, overflow = suppress_squares(centres, priority, float(PATCH_SIDE * stride), capacity)

    centre = centres.gather(1, index.unsqueeze(-1).expand(-1, -1, 2))
    end = torch.ceil(sizes.flip(-1) / stride).unsqueeze(1)
    corner = torch.minimum(torch.floor(centre / stride - PATCH_SIDE / 2), end - PATCH_SIDE)
    corners = torch.where(taken.unsqueeze(-1), corner.clamp(min=0), 0.0).long()

    batch, places = taken.shape
    image_index = torch.arange(batch, device=feature.device).repeat_interleave(places)
    patches = crop_patches(feature, image_index, corners.flatten(0, 1)).unflatten(0, (batch, places))
    patches = patches * taken[..., None, None]
    return ProbedPatches(patches, corners, taken, candidate, overflow)


@torch.library.custom_op("asag::adaptive_probing", mutates_args=())
def _adaptive_probing(
    anchors: Tensor, valid: Tensor, feature: Tensor, sizes: Tensor, stride: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(adaptive_probing_definition(anchors, valid, feature, sizes, stride, capacity))  # type: ignore[return-value]


@_adaptive_probing.register_fake
def _(
    anchors: Tensor, valid: Tensor, feature: Tensor, sizes: Tensor, stride: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, channels = feature.shape[:2]
    return (
        feature.new_empty((batch, capacity, PATCH_SIDE**2, channels)),
        feature.new_empty((batch, capacity, 2), dtype=torch.int64),
        feature.new_empty((batch, capacity), dtype=torch.bool),
        feature.new_empty((batch, anchors.shape[1]), dtype=torch.bool),
        feature.new_empty((batch,), dtype=torch.int32),
    )


def adaptive_probing(
    anchors: Tensor, valid: Tensor, feature: Tensor, sizes: Tensor, stride: int, capacity: int | None
) -> ProbedPatches:
    """:func:`adaptive_probing_definition`, as one op where no gradient is needed and K is fixed."""
    if capacity is None or (torch.is_grad_enabled() and feature.requires_grad):
        return adaptive_probing_definition(anchors, valid, feature, sizes, stride, capacity)
    return ProbedPatches(*torch.ops.asag.adaptive_probing(anchors, valid, feature, sizes, stride, capacity))
