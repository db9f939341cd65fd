"""The detector's forward pass while it trains: all heads, flipped P6 patches, patches from ground truth, denoising.

It runs the detector's own parts, so what is trained is what is deployed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from asag.families.asag.anchors import LEVEL_STRIDES, AnchorGenerator, Explored, probed_anchors_to_pixels
from asag.families.asag.config import HEADS
from asag.families.asag.detector import ASAGDetector, HeadOutput
from asag.families.asag.proposals import attention_allowed
from asag.families.asag.pyramid import Pyramid
from asag.families.asag.training.denoising import denoising_attention_mask, noised_queries
from asag.families.asag.training.probing import TrainingPatches, four_flips, training_patches
from asag.ops import adaptive_probing_definition, crop_patches
from asag.ops.adaptive_probing import probe_candidates
from asag.parts.boxes import content_scale
from asag.training.protocol import Batch, Step
from asag.training.transfer import to_device

PROPOSALS = "proposal"
"""The proposals among the stages that predict objects; the others are the heads, by their names."""


@dataclass(frozen=True)
class PatchPredictions:
    """What was predicted in N patches of a probed level."""

    anchors: Tensor
    """[N, k, 5] `cxcywh` in fractions of the patch, and confidence before the sigmoid."""
    corners: Tensor
    """[N, 2] int64 top-left cells (x, y)."""
    image_index: Tensor
    """[N] int64"""


@dataclass(frozen=True)
class TrainingAnchors:
    """All that the anchor generator predicted in a step, and the Q queries that it chose."""

    p6: Tensor
    """[B, 4, k, 5] the four flips, as in :class:`PatchPredictions`."""
    p5: Tensor
    """[B, 4, k, 5] the four quarters, likewise."""
    probed: Mapping[str, PatchPredictions]
    """By level, "P4" and "P3", as far as the configuration has them."""
    boxes: Tensor
    """[B, Q, 4] `cxcywh` in pixels."""
    valid: Tensor
    """[B, Q] bool, which queries are real."""

    @property
    def patches(self) -> int:
        """Number of probed patches."""
        return sum(len(level.image_index) for level in self.probed.values())


@dataclass(frozen=True)
class TrainingOutputs:
    """What the losses are made of."""

    sizes: Tensor
    """[B, 2] (height, width) of the contents in pixels, where the images are."""
    anchors: TrainingAnchors
    stages: Mapping[str, HeadOutput]
    """Of D noised and Q ordinary queries: `PROPOSALS`, and every head by its name."""
    noised: int = 0
    """D; the noised queries come first."""


def training_outputs(
    detector: ASAGDetector, batch: Batch, step: Step, denoising_scale: float | None = None
) -> TrainingOutputs:
    """The forward pass. denoising_scale: adds noised queries (None for none)."""
    pyramid = detector_pyramid(detector, batch, step)
    anchors = training_anchors(detector.anchor_generator, pyramid, batch, step)
    sizes = to_device(batch.sizes, batch.images.device)
    boxes, allowed, noised = anchors.boxes, attention_allowed(anchors.valid), 0
    if denoising_scale is not None:
        extra = noised_queries(batch.targets, denoising_scale, step.generators)
        noised = extra.boxes.shape[1]
        boxes = torch.cat((to_device(extra.boxes, boxes.device) * content_scale(sizes), boxes), dim=1)
        allowed = ~denoising_attention_mask(to_device(extra.group, boxes.device), anchors.valid).unsqueeze(1)
    proposals, heads = detector.decode(pyramid, boxes, allowed, sizes, HEADS)
    stages = {PROPOSALS: HeadOutput(proposals.logits, proposals.boxes), **heads}
    return TrainingOutputs(sizes, anchors, stages, noised)


@torch.no_grad()
def count_patches(detector: ASAGDetector, batch: Batch, step: Step) -> int:
    """How many P4 and P3 patches :func:`training_outputs` would predict with generators in the same state.

    Running statistics of norms stay as they are.
    """
    with _statistics_kept(detector):
        pyramid = detector_pyramid(detector, batch, step)
    return training_anchors(detector.anchor_generator, pyramid, batch, step).patches


def detector_pyramid(detector: ASAGDetector, batch: Batch, step: Step) -> Pyramid:
    """The maps in float32; backbone and neck are computed in the step's precision."""
    precision = step.feature_precision
    with torch.autocast(batch.images.device.type, dtype=precision, enabled=precision is not None):
        features = detector.features(batch.images)
    return detector.encode(features, to_device(batch.sizes, batch.images.device), batch.images)


@contextmanager
def _statistics_kept(detector: ASAGDetector) -> Iterator[None]:
    """Norms that learn normalize by the batch as ever, but remember nothing of it."""
    learning = [norm for norm in detector.backbone.norms() if norm.training]
    for norm in learning:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in learning:
            norm.track_running_stats = True


def training_anchors(generator: AnchorGenerator, pyramid: Pyramid, batch: Batch, step: Step) -> TrainingAnchors:
    """The anchors of every patch of this step, and the queries among them."""
    sizes = to_device(batch.sizes, batch.images.device)
    fixed = generator.fixed_level(pyramid, sizes, four_flips)
    limit = generator.config.budget.patch_limit
    objects = [target["boxes"] for target in batch.targets]
    probed: dict[str, PatchPredictions] = {}

    def explore(level: str, coarser: Explored) -> tuple[Explored, Tensor]:
        stride = LEVEL_STRIDES[level]
        if step.epoch == 0:
            # The probed patches come from ground truth, so no candidate is explored: all of them stay queries.
            asked = torch.zeros_like(coarser.valid)
            wanted = torch.empty((0, 2), dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        else:
            asked = probe_candidates(*coarser, stride)
            wanted = _wanted_patches(coarser, batch.sizes, stride, limit)
        patches = training_patches(*wanted, objects, batch.sizes, stride, step.epoch, step.generators, most=limit)
        probed[level] = _predict_patches(generator, level, pyramid, patches)
        return _explored(probed[level], patches, level, sizes), asked

    # What is explored and which anchors become queries is no matter of gradients.
    coarse = fixed.explored._replace(anchors=fixed.anchors.detach())
    boxes, valid = generator.choose_queries(coarse, explore)
    return TrainingAnchors(fixed.p6, fixed.p5, probed, boxes, valid)


@torch.no_grad()
def _wanted_patches(coarser: Explored, contents: Tensor, stride: int, limit: int | None) -> tuple[Tensor, Tensor]:
    """Corners [N, 2] and image index [N], on the CPU, of the patches that the coarser level's anchors ask for.

    Suppression looks after every patch whether another one is left, and a GPU would have to be waited for each time. So
    the anchors come to the CPU, once. `contents` [B, 2] (height, width) in pixels, on the CPU.
    """
    asking = torch.cat((coarser.anchors, coarser.valid.unsqueeze(-1)), dim=-1).cpu()
    no_cells = asking.new_empty((len(asking), 0, 1, 1))  # only the places are wanted, not what a map holds there
    found = adaptive_probing_definition(asking[..., :5], asking[..., 5] > 0, no_cells, contents, stride, limit)
    return found.corners[found.valid], found.valid.nonzero()[:, 0]


def _predict_patches(
    generator: AnchorGenerator, level: str, pyramid: Pyramid, patches: TrainingPatches
) -> PatchPredictions:
    feature = generator.compressed(level, pyramid)
    corners, image_index = (to_device(part, feature.device) for part in (patches.corners, patches.image_index))
    anchors = generator.predict(crop_patches(feature, image_index, corners), level)
    return PatchPredictions(anchors, corners, image_index)


@torch.no_grad()
def _explored(predictions: PatchPredictions, patches: TrainingPatches, level: str, sizes: Tensor) -> Explored:
    """The anchors of patches, laid out per image; patches that serve the loss alone are left out."""
    content = sizes[predictions.image_index].unsqueeze(1)
    pixels = probed_anchors_to_pixels(predictions.anchors, predictions.corners, LEVEL_STRIDES[level], content)
    chosen = patches.explored.nonzero()[:, 0]
    image = patches.image_index[chosen]
    counts = torch.bincount(image, minlength=len(sizes))
    places = max(int(counts.max()), 1)  # one that is not valid where no image explores: probing needs an axis
    place = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]
    chosen, image, place = (to_device(index, pixels.device) for index in (chosen, image, place))
    laid_out = pixels.new_zeros((len(sizes), places, *pixels.shape[1:]))
    laid_out[image, place] = pixels[chosen]
    valid = torch.zeros((len(sizes), places), dtype=torch.bool, device=pixels.device)
    valid[image, place] = True
    return Explored(laid_out.flatten(1, 2), valid.repeat_interleave(pixels.shape[1], dim=1))
