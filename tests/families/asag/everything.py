"""All that an ASAG detector works out about a batch, under the names of the golden cases."""

from __future__ import annotations

import torch
from torch import Tensor

from asag.families.asag.detector import ASAGDetector
from asag.families.asag.proposals import attention_allowed


@torch.no_grad()
def all_stages(detector: ASAGDetector, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    """`p6_anchors` [B, 1, k, 5], `p5_anchors` [B, 4, k, 5], and for each level that was explored `p4_anchors`
    [patches, k, 5], `p4_crop_xy` [patches, 2] (cells), `p4_image_index` [patches] (boxes after the sigmoid, confidence
    before it); `anchors` [B, N, 4] (`cxcywh`, pixels), `valid` [B, N]; `proposal_logits`, `proposal_boxes`, and
    `<head>_logits` [B, N, classes], `<head>_boxes` [B, N, 4] (`cxcywh`, fractions of the content) of every head.
    """
    pyramid = detector.encode(detector.features(images), sizes, images)
    anchors = detector.anchor_generator(pyramid, sizes, detector.capacity)
    allowed = attention_allowed(anchors.valid)
    proposals, outputs = detector.decode(pyramid, anchors.boxes, allowed, sizes, detector.heads)
    found = {"p6_anchors": anchors.fixed.p6, "p5_anchors": anchors.fixed.p5}
    for level, probed in anchors.probed.items():
        name = level.lower()
        found[f"{name}_anchors"] = probed.predictions[probed.valid]
        found[f"{name}_crop_xy"] = probed.corners[probed.valid]
        found[f"{name}_image_index"] = probed.valid.nonzero()[:, 0]
    found |= {"anchors": anchors.boxes, "valid": anchors.valid}
    found |= {"proposal_logits": proposals.logits, "proposal_boxes": proposals.boxes}
    for name, output in outputs.items():
        found |= {f"{name}_logits": output.logits, f"{name}_boxes": output.boxes}
    return found
