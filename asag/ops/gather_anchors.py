"""GatherAnchors: from all levels' anchors to the queries (ASAG's README, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_anchors_definition(
    anchors: Tensor, selectable: Tensor, first: int, keep_threshold: float, fewest: int, most: int
) -> tuple[Tensor, Tensor]:
    """Apply the keep threshold, the "fewest" rule of the first level and the "most" rule of all.

    anchors: [B, A, 5] (cx, cy, w, h in pixels, confidence in 0..1), the levels one after another, coarse to fine;
    selectable: [B, A] bool, false for padding and for candidates that a finer level explores; first: how many of the A
    belong to P5 and P6; most: Q. Returns boxes [B, Q, 4] `cxcywh` in pixels (zeros where not valid) and valid [B, Q]
    bool, valid ones first. The order is the levels', or falling confidence where one of the two cuts applied. A NaN
    confidence is never selected.
    """
    batch, total = anchors.shape[:2]
    confidence = torch.where(anchors[..., 4].isnan(), -1.0, anchors[..., 4])
    keep = selectable & (confidence > keep_threshold)

    few = keep[:, :first].sum(dim=1, keepdim=True) < fewest
    by_confidence = confidence[:, :first].argsort(dim=1, descending=True, stable=True)
    position = torch.arange(total, device=anchors.device)
    order = torch.cat(
        (torch.where(few, by_confidence, position[:first]), position[first:].expand(batch, -1)),
        dim=1,
    )
    confidence = confidence.gather(1, order)
    keep_first = torch.where(few, position[:first] < fewest, keep[:, :first]) & (confidence[:, :first] >= 0)
    keep = torch.cat((keep_first, keep[:, first:]), dim=1)

    too_many = keep.sum(dim=1, keepdim=True) > most
    key = torch.where(too_many, confidence, (total - position).to(confidence.dtype))
    key = torch.where(keep, key, -1.0)
    key, chosen = key.sort(dim=1, descending=True, stable=True)
    valid = key[:, :most] >= 0
    chosen = order.gather(1, chosen[:, :most])
    boxes = anchors[..., :4].gather(1, chosen.unsqueeze(-1).expand(-1, -1, 4))
    return torch.where(valid.unsqueeze(-1), boxes, 0.0), valid


@torch.library.custom_op("asag::gather_anchors", mutates_args=())
def _gather_anchors(
    anchors: Tensor, selectable: Tensor, first: int, keep_threshold: float, fewest: int, most: int
) -> tuple[Tensor, Tensor]:
    return gather_anchors_definition(anchors, selectable, first, keep_threshold, fewest, most)


@_gather_anchors.register_fake
def _(
    anchors: Tensor, selectable: Tensor, first: int, keep_threshold: float, fewest: int, most: int
) -> tuple[Tensor, Tensor]:
    batch = anchors.shape[0]
    return anchors.new_empty((batch, most, 4)), anchors.new_empty((batch, most), dtype=torch.bool)


def gather_anchors(
    anchors: Tensor, selectable: Tensor, first: int, keep_threshold: float, fewest: int, most: int
) -> tuple[Tensor, Tensor]:
    """:func:`gather_anchors_definition`, as one op. Anchors reach the queries without gradient."""
    boxes, valid = torch.ops.asag.gather_anchors(anchors.detach(), selectable, first, keep_threshold, fewest, most)
    return boxes, valid
