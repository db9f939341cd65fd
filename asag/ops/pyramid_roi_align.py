"""PyramidRoIAlign: 7x7 features of each box from the pyramid level that fits it (ASAG's README, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align

from asag.parts.boxes import cxcywh_to_xyxy

STRIDES = (4, 8, 16, 32)
"""Input pixels per cell of P2, P3, P4 and P5."""

ROI_SIDE = 7
SAMPLING_RATIO = 2


def pyramid_level(boxes: Tensor) -> Tensor:
    """[..., 4] `cxcywh` in pixels -> [...] int64, 0..3 for P2..P5: `floor(4 + log2(sqrt(area)/224) + 1e-6)` clamped.

    Lin et al., "Feature Pyramid Networks for Object Detection", equation 1.
    """
    scale = torch.sqrt(boxes[..., 2] * boxes[..., 3])
    return torch.floor(4 + torch.log2(scale / 224) + 1e-6).clamp(2, 5).nan_to_num(2).long() - 2


def pyramid_roi_align_definition(p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor) -> Tensor:
    """RoIAlign of each box on its level: sampling ratio 2, no half-pixel offset.

    p2..p5: [B, C, H, W] at strides 4, 8, 16, 32; boxes: [B, Q, 4] `cxcywh` in pixels -> [B, Q, C, 7, 7].
    """
    batch, queries = boxes.shape[:2]
    corners = cxcywh_to_xyxy(boxes).flatten(0, 1)
    image_index = torch.arange(batch, device=boxes.device).repeat_interleave(queries)
    rois = torch.cat((image_index.unsqueeze(1).to(corners.dtype), corners), dim=1)
    levels = pyramid_level(boxes).flatten()
    # How many boxes each level has is asked for once, not level by level: on a GPU every answer is waited for.
    counts = (levels == torch.arange(len(STRIDES), device=boxes.device).unsqueeze(1)).sum(dim=1).cpu().tolist()
    by_level = levels.argsort(stable=True).split(counts)
    result = p2.new_zeros((batch * queries, p2.shape[1], ROI_SIDE, ROI_SIDE))
    for feature, stride, chosen in zip((p2, p3, p4, p5), STRIDES, by_level, strict=True):
        pooled = roi_align(feature, rois[chosen].to(feature.dtype), ROI_SIDE, 1 / stride, SAMPLING_RATIO, aligned=False)
        result = result.index_copy(0, chosen, pooled)
    return result.unflatten(0, (batch, queries))


@torch.library.custom_op("asag::pyramid_roi_align", mutates_args=())
def _pyramid_roi_align(p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor) -> Tensor:
    return pyramid_roi_align_definition(p2, p3, p4, p5, boxes)


@_pyramid_roi_align.register_fake
def _(p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor) -> Tensor:
    return p2.new_empty((*boxes.shape[:2], p2.shape[1], ROI_SIDE, ROI_SIDE))


def pyramid_roi_align(features: list[Tensor], boxes: Tensor) -> Tensor:
    """:func:`pyramid_roi_align_definition` of P2..P5, as one op where no gradient is needed."""
    p2, p3, p4, p5 = features
    if torch.is_grad_enabled() and p2.requires_grad:
        return pyramid_roi_align_definition(p2, p3, p4, p5, boxes)
    return torch.ops.asag.pyramid_roi_align(p2, p3, p4, p5, boxes)
