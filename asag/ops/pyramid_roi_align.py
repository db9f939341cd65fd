"""PyramidRoIAlign: 7x7 features of each box from the pyramid level that fits it (ASAG's README, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from asag.parts.boxes import cxcywh_to_xyxy

STRIDES = (4, 8, 16, 32)
"""Input pixels per cell of P2, P3, P4 and P5."""

ROI_SIDE = 7
SAMPLING_RATIO = 2


def pyramid_level(boxes: Tensor, maps: int = len(STRIDES), first_stride: int = STRIDES[0]) -> Tensor:
    """[..., 4] `cxcywh` in pixels -> [...] int64, which of the maps fits: 0 for the first.

    `floor(4 + log2(sqrt(area)/224) + 1e-6)`, clamped to the binary logarithms of the maps' strides (Lin et al.,
    "Feature Pyramid Networks for Object Detection", equation 1).
    """
    first = first_stride.bit_length() - 1
    scale = torch.sqrt(boxes[..., 2] * boxes[..., 3])
    level = torch.floor(4 + torch.log2(scale / 224) + 1e-6).clamp(first, first + maps - 1)
    return level.nan_to_num(first).long() - first


def pyramid_roi_align_definition(
    p2: Tensor,
    p3: Tensor,
    p4: Tensor,
    p5: Tensor,
    boxes: Tensor,
    maps: int = len(STRIDES),
    first_stride: int = STRIDES[0],
) -> Tensor:
    """RoIAlign of each box on its level: sampling ratio 2, no half-pixel offset.

    p2..p5: [B, C, H, W], of which the first `maps` count, the first of them at `first_stride` (a power of two), each
    other at twice the stride of the one before; boxes: [B, Q, 4] `cxcywh` in pixels -> [B, Q, C, 7, 7].
    """
    batch, queries = boxes.shape[:2]
    corners = cxcywh_to_xyxy(boxes).flatten(0, 1)
    image_index = torch.arange(batch, device=boxes.device).repeat_interleave(queries)
    rois = torch.cat((image_index.unsqueeze(1).to(corners.dtype), corners), dim=1)
    levels = pyramid_level(boxes, maps, first_stride).flatten()
    # How many boxes each level has is asked for once, not level by level: on a GPU every answer is waited for.
    counts = (levels == torch.arange(maps, device=boxes.device).unsqueeze(1)).sum(dim=1).cpu().tolist()
    by_level = levels.argsort(stable=True).split(counts)
    result = p2.new_zeros((batch * queries, p2.shape[1], ROI_SIDE, ROI_SIDE))
    for level, (feature, chosen) in enumerate(zip((p2, p3, p4, p5), by_level, strict=False)):
        scale = 1 / (first_stride << level)
        pooled = roi_align(feature, rois[chosen].to(feature.dtype), ROI_SIDE, scale, SAMPLING_RATIO, aligned=False)
        result = result.index_copy(0, chosen, pooled)
    return result.unflatten(0, (batch, queries))


@torch.library.custom_op("asag::pyramid_roi_align", mutates_args=())
def _pyramid_roi_align(
    p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor, maps: int, first_stride: int
) -> Tensor:
    return pyramid_roi_align_definition(p2, p3, p4, p5, boxes, maps, first_stride)


@_pyramid_roi_align.register_fake
def _(p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor, maps: int, first_stride: int) -> Tensor:
    return p2.new_empty((*boxes.shape[:2], p2.shape[1], ROI_SIDE, ROI_SIDE))


def pyramid_roi_align(features: Sequence[Tensor], boxes: Tensor, first_stride: int = STRIDES[0]) -> Tensor:
    """:func:`pyramid_roi_align_definition` of up to four maps, as one op where no gradient is needed."""
    maps = len(features)
    p2, p3, p4, p5 = *features, *[features[-1]] * (len(STRIDES) - maps)
    if torch.is_grad_enabled() and p2.requires_grad:
        return pyramid_roi_align_definition(p2, p3, p4, p5, boxes, maps, first_stride)
    return torch.ops.asag.pyramid_roi_align(p2, p3, p4, p5, boxes, maps, first_stride)
