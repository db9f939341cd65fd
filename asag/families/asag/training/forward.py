"""The detector's forward pass while it trains: all heads, flipped P6 patches, patches from ground truth, denoising.

Everything is composed of the detector's own parts, so what is trained is what runs (specification section 7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asag.families.asag.anchors import (
    LEVEL_STRIDES,
    AnchorGenerator,
    fixed_anchors_to_pixels,
    probed_anchors_to_pixels,
    split_quarters,
)
from asag.families.asag.config import HEADS
from asag.families.asag.detector import ASAGDetector
from asag.families.asag.proposals import attention_allowed
from asag.families.asag.training.denoising import denoising_attention_mask, noised_queries
from asag.families.asag.training.probing import TrainingPatches, four_flips, training_patches
from asag.ops import adaptive_probing_definition, crop_patches
from asag.ops.adaptive_probing import probe_candidates
from asag.parts.boxes import content_scale
from asag.training.randomness import Generators
from asag.training.transfer import to_device


@dataclass
class _Explored:
    """The explored anchors of a level: [B, A, 5] in pixels and which of them exist [B, A]."""

    anchors: Tensor
    valid: Tensor


class TrainingForward(nn.Module):
    """`training_outputs` as a module, for wrappers that take one; called with its arguments after the detector."""

    def __init__(self, detector: ASAGDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """See `training_outputs`."""
        return training_outputs(self.detector, *arguments, **options)


def training_outputs(
    detector: ASAGDetector,
    images: Tensor,
    sizes: Tensor,
    targets: Sequence[Mapping[str, Tensor]],
    epoch: int,
    generator: Generators = None,
    denoising_scale: float | None = None,
    feature_precision: torch.dtype | None = None,
) -> dict[str, Any]:
    """The outputs that :class:`train.DetectionCriterion` takes, by its names.

    images: [B, 3, H, W] normalized, zero-padded; sizes: [B, 2] float32 (height, width) of the content in pixels;
    targets: per image `boxes` [n, 4] (normalized `cxcywh`) and `labels` [n]; epoch: from 0, which takes its patches
    from ground truth; generator: source of every random draw, one or one for each image; denoising_scale: adds noised
    queries (None for none); feature_precision: run backbone and neck in that type under autocast.

    Sizes and targets belong on the CPU, where patches are chosen: on a GPU they would have to be waited for.
    """
    with torch.autocast(images.device.type, dtype=feature_precision, enabled=feature_precision is not None):
        features = detector.features(images)
    boxes, valid, outputs = _training_anchors(detector.anchor_generator, features, sizes, targets, epoch, generator)
    sizes = outputs["image_sizes_hw"]
    outputs |= {"anchors": boxes, "valid": valid}

    allowed = attention_allowed(valid)
    if denoising_scale is not None:
        noised = noised_queries(targets, denoising_scale, generator)
        boxes = torch.cat((to_device(noised.boxes, boxes.device) * content_scale(sizes), boxes), dim=1)
        allowed = ~denoising_attention_mask(to_device(noised.group, boxes.device), valid).unsqueeze(1)
        outputs["denoising_queries"] = noised.boxes.shape[1]
    proposals = detector.proposals(features, boxes, allowed, sizes)
    outputs |= {"proposal_logits": proposals.logits, "proposal_boxes": proposals.boxes}
    for name in HEADS:
        head = detector.run_head(name, features, proposals, allowed, sizes)
        outputs |= {f"{name}_logits": head.logits, f"{name}_boxes": head.boxes}
    return outputs


@torch.no_grad()
def count_patches(
    detector: ASAGDetector,
    images: Tensor,
    sizes: Tensor,
    targets: Sequence[Mapping[str, Tensor]],
    epoch: int,
    generator: Generators = None,
    feature_precision: torch.dtype | None = None,
) -> int:
    """How many P4 and P3 patches `training_outputs` would predict with a generator in the same state.

    Running statistics of norms stay as they are.
    """
    learning = [norm for norm in detector.backbone.norms() if norm.training]
    for norm in learning:
        norm.track_running_stats = False
    try:
        with torch.autocast(images.device.type, dtype=feature_precision, enabled=feature_precision is not None):
            features = detector.features(images)
    finally:
        for norm in learning:
            norm.track_running_stats = True
    found = _training_anchors(detector.anchor_generator, features, sizes, targets, epoch, generator)[2]
    return sum(len(found[name]) for name in ("p4_image_index", "p3_image_index") if name in found)


def _training_anchors(
    anchors: AnchorGenerator,
    features: list[Tensor],
    sizes: Tensor,
    targets: Sequence[Mapping[str, Tensor]],
    epoch: int,
    generator: Generators,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The queries' boxes [B, Q, 4] and valid [B, Q], and the outputs of every patch of this step by their names."""
    contents = sizes.cpu()
    sizes = to_device(sizes, features[0].device)
    p5_map, p6_map = anchors.fixed_maps(features, sizes)
    p5 = anchors.predict(split_quarters(p5_map), "P5")
    p6 = anchors.predict(four_flips(p6_map).flatten(3).transpose(2, 3), "P5")
    outputs: dict[str, Any] = {"image_sizes_hw": sizes, "p5_anchors": p5, "p6_anchors": p6}
    with torch.no_grad():
        pixels = fixed_anchors_to_pixels(p5, p6[:, :1], sizes)
    level = _Explored(pixels, torch.ones_like(pixels[..., 0], dtype=torch.bool))
    collected, selectable = [], []
    for name in anchors.config.probed_levels:
        stride, limit = LEVEL_STRIDES[name], anchors.config.budget.patch_limit
        collected.append(level.anchors)
        if epoch == 0:
            # The probed patches come from ground truth, so no candidate is explored: all of them stay queries.
            predicted = torch.empty((0, 2), dtype=torch.int64), torch.empty(0, dtype=torch.int64)
            selectable.append(level.valid)
        else:
            predicted = _predicted_patches(level, contents, stride, limit)
            selectable.append(level.valid & ~probe_candidates(level.anchors, level.valid, stride))
        objects = [target["boxes"] for target in targets]
        patches = training_patches(*predicted, objects, contents, stride, epoch, generator, most=limit)
        level = _explore(anchors, name, features, patches, sizes, outputs)
    collected.append(level.anchors)
    selectable.append(level.valid)
    with torch.no_grad():
        boxes, chosen = anchors.gather(collected, selectable)
        used = int(chosen.sum(dim=1).max())
    return boxes[:, :used], chosen[:, :used], outputs


@torch.no_grad()
def _predicted_patches(coarser: _Explored, contents: Tensor, stride: int, limit: int | None) -> tuple[Tensor, Tensor]:
    """Corners [N, 2] and image index [N], on the CPU, of the patches that the coarser level's anchors ask for.

    Suppression looks after every patch whether another one is left, and a GPU would have to be waited for each time. So
    the anchors come to the CPU, once. `contents` [B, 2] (height, width) in pixels, on the CPU.
    """
    asking = torch.cat((coarser.anchors, coarser.valid.unsqueeze(-1)), dim=-1).cpu()
    no_cells = asking.new_empty((len(asking), 0, 1, 1))  # only the places are wanted, not what a map holds there
    found = adaptive_probing_definition(asking[..., :5], asking[..., 5] > 0, no_cells, contents, stride, limit)
    return found.corners[found.valid], found.valid.nonzero()[:, 0]


def _explore(
    anchors: AnchorGenerator,
    name: str,
    features: list[Tensor],
    patches: TrainingPatches,
    sizes: Tensor,
    outputs: dict[str, Any],
) -> _Explored:
    """Predict the patches of one level into `outputs`; returns its explored anchors."""
    feature = anchors.compressed(name, features)
    corners, image_index = (to_device(part, feature.device) for part in (patches.corners, patches.image_index))
    predictions = anchors.predict(crop_patches(feature, image_index, corners), name)
    prefix = name.lower()
    outputs |= {
        f"{prefix}_anchors": predictions,
        f"{prefix}_crop_xy": corners,
        f"{prefix}_image_index": image_index,
    }
    with torch.no_grad():
        content = sizes[image_index].unsqueeze(1)
        pixels = probed_anchors_to_pixels(predictions, corners, LEVEL_STRIDES[name], content)
        return _explored_anchors(pixels, patches, len(sizes))


def _explored_anchors(pixels: Tensor, patches: TrainingPatches, batch: int) -> _Explored:
    """Anchors [N, k, 5] of patches, laid out per image; patches that serve the loss alone are left out."""
    explored = patches.explored.nonzero()[:, 0]
    image = patches.image_index[explored]
    counts = torch.bincount(image, minlength=batch)
    places = max(int(counts.max()), 1)  # one that is not valid where no image explores: probing needs an axis
    place = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]
    explored, image, place = (to_device(index, pixels.device) for index in (explored, image, place))
    laid_out = pixels.new_zeros((batch, places, *pixels.shape[1:]))
    laid_out[image, place] = pixels[explored]
    valid = torch.zeros((batch, places), dtype=torch.bool, device=pixels.device)
    valid[image, place] = True
    return _Explored(laid_out.flatten(1, 2), valid.repeat_interleave(pixels.shape[1], dim=1))
