"""The anchor generator: sparse anchors from patches, coarse to fine (README, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag.detector import stage
from asag.families.asag.config import ASAGConfig
from asag.families.asag.pyramid import Pyramid
from asag.ops import adaptive_probing, gather_anchors
from asag.ops.adaptive_probing import PATCH_SIDE
from asag.ops.pyramid_roi_align import STRIDES
from asag.parts.boxes import content_scale
from asag.parts.layers import MLP

FIXED_SIDE = 2 * PATCH_SIDE
"""Cells along each side of the resized P5 map: two patches."""

SMALLEST_ANCHOR = 3.0
"""Pixels; an anchor narrower or lower than this gets confidence 0."""

LEVEL_STRIDES = dict(zip(("P2", "P3", "P4", "P5"), STRIDES, strict=True))


class Explored(NamedTuple):
    """The anchors of one level."""

    anchors: Tensor
    """[B, A, 5] (cx, cy, w, h in pixels, confidence in 0..1)."""
    valid: Tensor
    """[B, A] bool."""


Explore = Callable[[str, Explored], tuple[Explored | None, Tensor]]
"""Explores a level, by its name and the anchors of the coarser one: the level's own anchors, or None where no image
has any, and which of the coarser ones asked for a closer look, [B, A] bool."""


@dataclass
class FixedLevel:
    """Anchors of P5 and P6, which every image has."""

    p5: Tensor
    """[B, 4, k, 5] boxes after the sigmoid, relative to their quarter; confidence before it."""
    p6: Tensor
    """[B, V, k, 5] likewise, relative to the content, of every view of the P6 patch; the first is the patch itself."""
    anchors: Tensor
    """[B, 5k, 5] (cx, cy, w, h in pixels, confidence in 0..1)."""

    @property
    def explored(self) -> Explored:
        """All of them exist."""
        return Explored(self.anchors, torch.ones_like(self.anchors[..., 0], dtype=torch.bool))


@dataclass
class ProbedLevel:
    """Anchors of a probed level with room for K patches per image."""

    predictions: Tensor
    """[B, K, k, 5] boxes after the sigmoid, relative to their patch; confidence before it."""
    corners: Tensor
    """[B, K, 2] int64 (x, y) cells."""
    valid: Tensor
    """[B, K] bool."""
    anchors: Tensor
    """[B, K*k, 5] (cx, cy, w, h in pixels, confidence in 0..1)."""
    overflow: Tensor
    """[B] int32: candidates left unexplored."""

    @property
    def explored(self) -> Explored:
        """Those of patches that exist."""
        return Explored(self.anchors, self.valid.repeat_interleave(self.predictions.shape[2], dim=1))


@dataclass
class Anchors:
    """All that the generator found out about a batch."""

    boxes: Tensor
    """[B, Q, 4] `cxcywh` in pixels."""
    valid: Tensor
    """[B, Q] bool."""
    fixed: FixedLevel
    probed: dict[str, ProbedLevel]
    """By level name, "P4" then "P3"; a level that no image explored is missing."""

    @property
    def overflow(self) -> Tensor:
        """[B] int32: candidates of all levels that found no place."""
        none = torch.zeros(self.boxes.shape[0], dtype=torch.int32, device=self.boxes.device)
        return sum((level.overflow for level in self.probed.values()), none)


def itself(feature: Tensor) -> Tensor:
    """A map [B, C, H, W] as its only view [B, 1, C, H, W]."""
    return feature.unsqueeze(1)


class AnchorGenerator(nn.Module):
    """P3..P5 and content sizes -> anchors. See :class:`Anchors`."""

    def __init__(self, config: ASAGConfig) -> None:
        super().__init__()
        self.config = config
        size, budget = config.size, config.budget
        cells, channels = PATCH_SIDE**2, size.patch_channels
        self.compress = nn.ModuleDict(
            {
                level: nn.Sequential(
                    nn.Conv2d(size.channels, size.compressed_channels, 1),
                    nn.GELU(),
                    nn.Conv2d(size.compressed_channels, channels, 3, padding=1),
                )
                for level in ("P3", "P4", "P5")
            }
        )
        self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=2, dilation=2)
        self.norm = nn.ModuleDict({level: nn.LayerNorm((cells, channels)) for level in ("P5", "P4", "P3")})
        self.position = nn.ParameterDict(
            {level: nn.Parameter(torch.randn(cells, channels) * 0.02) for level in ("P5", "P4", "P3")}
        )
        hidden = (size.anchor_hidden, size.anchor_hidden)
        self.fixed_mlp = MLP((cells * channels, *hidden, budget.fixed_anchors * 5))
        self.probed_mlp = MLP((cells * channels, *hidden, budget.probed_anchors * 5))

    def forward(self, pyramid: Pyramid, sizes: Tensor, capacity: tuple[int, int] | None = None) -> Anchors:
        """sizes: [B, 2] (height, width) of the content in pixels.

        capacity: places for patches per image on P4 and P3, so that every shape is static; None takes as many as the
        fullest image needs and drops query places that no image uses.
        """
        fixed = self.fixed_level(pyramid, sizes)
        places = dict(zip(self.config.probed_levels, capacity or (None, None), strict=False))
        probed: dict[str, ProbedLevel] = {}

        def explore(level: str, coarser: Explored) -> tuple[Explored | None, Tensor]:
            found, asked = self.probe(level, pyramid, coarser, sizes, places[level])
            if found is None:
                return None, asked
            probed[level] = found
            return found.explored, asked

        boxes, chosen = self.choose_queries(fixed.explored, explore, trim=capacity is None)
        boxes, chosen = stage("anchors", boxes=boxes, valid=chosen)
        return Anchors(boxes, chosen, fixed, probed)

    def choose_queries(self, coarse: Explored, explore: Explore, trim: bool = True) -> tuple[Tensor, Tensor]:
        """Explore the probed levels, coarse to fine, and choose the queries: boxes [B, Q, 4] and valid [B, Q].

        An anchor that asked for a closer look at a level is no query. trim: drop the places that no image uses.
        """
        levels, selectable = [coarse], []
        for name in self.config.probed_levels:
            coarser = levels[-1]
            finer, asked = explore(name, coarser)
            selectable.append(coarser.valid & ~asked)
            if finer is None:
                break
            levels.append(finer)
        else:
            selectable.append(levels[-1].valid)
        budget = self.config.budget
        boxes, chosen = gather_anchors(
            torch.cat([level.anchors for level in levels], 1),
            torch.cat(selectable, 1),
            coarse.anchors.shape[1],
            budget.keep_threshold,
            budget.fewest,
            budget.most,
        )
        if trim:
            used = int(chosen.sum(dim=1).max())
            boxes, chosen = boxes[:, :used], chosen[:, :used]
        return boxes, chosen

    def compressed(self, level: str, pyramid: Pyramid) -> Tensor:
        """The 8-channel map [B, 8, H, W] of "P3", "P4" or "P5"."""
        return self.compress[level](pyramid.level(level))

    def predict(self, patches: Tensor, level: str) -> Tensor:
        """Patches [..., 225, 8] of `level` (P6 patches use "P5") -> [..., k, 5]: sigmoid boxes, confidence logits."""
        tokens = self.norm[level](patches) + self.position[level]
        mlp = self.fixed_mlp if level == "P5" else self.probed_mlp
        raw = mlp(tokens.flatten(-2)).unflatten(-1, (-1, 5))
        return torch.cat((raw[..., :4].sigmoid(), raw[..., 4:]), dim=-1)

    def fixed_maps(self, pyramid: Pyramid, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The content of P5 resized to [B, 8, 30, 30], and the P6 map [B, 8, 15, 15]."""
        p5 = resize_content(self.compressed("P5", pyramid), sizes / LEVEL_STRIDES["P5"], FIXED_SIDE)
        return p5, self.p6(F.relu(p5))

    def fixed_level(self, pyramid: Pyramid, sizes: Tensor, views: Callable[[Tensor], Tensor] = itself) -> FixedLevel:
        """The anchors of the four quarters of P5 and of P6.

        views: P6 map [B, 8, 15, 15] -> [B, V, 8, 15, 15], what is looked at of it; first the map itself.
        """
        p5_map, p6_map = self.fixed_maps(pyramid, sizes)
        p5 = self.predict(split_quarters(p5_map), "P5")
        p6 = self.predict(views(p6_map).flatten(3).transpose(2, 3), "P5")
        (anchors,) = stage("coarse_anchors", boxes=fixed_anchors_to_pixels(p5, p6[:, :1], sizes))
        return FixedLevel(p5, p6, anchors)

    def probe(
        self, level: str, pyramid: Pyramid, coarser: Explored, sizes: Tensor, capacity: int | None
    ) -> tuple[ProbedLevel | None, Tensor]:
        """Explore `level` where the coarser anchors ask for it.

        Returns the level, or None when no image explores it, and the mask [B, A] of anchors that asked.
        """
        stride = LEVEL_STRIDES[level]
        limit = self.config.budget.patch_limit
        limited = limit is not None and (capacity is None or capacity >= limit)
        (feature,) = stage(f"{level}_patches", map=self.compressed(level, pyramid))
        found = adaptive_probing(*coarser, feature, sizes, stride, limit if limited else capacity)
        if found.valid.shape[1] == 0 or (capacity is None and not bool(found.valid.any())):
            return None, found.candidate
        corners, chosen = stage(f"{level}_patches", corners=found.corners, valid=found.valid)
        predictions = self.predict(found.patches, level)
        pixels = probed_anchors_to_pixels(predictions, corners, stride, sizes.unsqueeze(1).unsqueeze(1))
        (explored,) = stage(f"{level}_anchors", boxes=pixels.flatten(1, 2))
        overflow = torch.zeros_like(found.overflow) if limited else found.overflow
        return ProbedLevel(predictions, corners, chosen, explored, overflow), found.candidate


def resize_content(feature: Tensor, cells: Tensor, side: int) -> Tensor:
    """Crop each map to its content and resize it bilinearly (half-pixel centres, no antialias).

    feature: [B, C, H, W]; cells: [B, 2] (height, width) of the content in cells, rounded half to even, at least one
    -> [B, C, side, side]. Written as two matrix products, so that a crop whose size depends on the image keeps
    every shape static: the weight of a source cell is the hat function of its distance to the sampling position.
    """
    count = cells.round().clamp(min=1)

    def hat(extent: int, length: Tensor) -> Tensor:
        target = torch.arange(side, device=feature.device, dtype=feature.dtype) + 0.5
        source = (target * (length / side).unsqueeze(1) - 0.5).clamp(min=0)
        source = torch.minimum(source, (length - 1).unsqueeze(1))
        cell = torch.arange(extent, device=feature.device, dtype=feature.dtype)
        return (1 - (source.unsqueeze(2) - cell).abs()).clamp(min=0)

    rows = hat(feature.shape[2], count[:, 0]).unsqueeze(1)
    columns = hat(feature.shape[3], count[:, 1]).unsqueeze(1)
    return rows @ feature @ columns.transpose(2, 3)


def split_quarters(feature: Tensor) -> Tensor:
    """[B, C, 30, 30] -> [B, 4, 225, C]: top-left, top-right, bottom-left, bottom-right, row-major."""
    batch, channels = feature.shape[:2]
    quarters = feature.reshape(batch, channels, 2, PATCH_SIDE, 2, PATCH_SIDE).permute(0, 2, 4, 3, 5, 1)
    return quarters.reshape(batch, 4, PATCH_SIDE**2, channels)


def fixed_anchors_to_pixels(p5: Tensor, p6: Tensor, sizes: Tensor) -> Tensor:
    """Predictions [B, 4, k, 5] of the quarters and [B, 1, k, 5] of P6 -> anchors [B, 5k, 5] in pixels."""
    quarter = torch.arange(4, device=p5.device)
    corner = F.pad(torch.stack((quarter % 2, quarter // 2), dim=-1) * 0.5, (0, 2)).to(p5.dtype)
    boxes = torch.cat((p5[..., :4] / 2 + corner.unsqueeze(1), p6[..., :4]), dim=1).flatten(1, 2)
    confidence = torch.cat((p5[..., 4], p6[..., 4]), dim=1).flatten(1, 2).sigmoid()
    boxes = boxes * content_scale(sizes)
    confidence = torch.where((boxes[..., 2:] < SMALLEST_ANCHOR).any(dim=-1), 0.0, confidence)
    return torch.cat((boxes, confidence.unsqueeze(-1)), dim=-1)


def probed_anchors_to_pixels(predictions: Tensor, corners: Tensor, stride: int, sizes: Tensor) -> Tensor:
    """Predictions [..., k, 5] of patches at corners [..., 2] (cells) -> anchors [..., k, 5] in pixels.

    sizes: (height, width) of the content, broadcastable to [..., k, 2]. An anchor centred at or past the content's
    right or bottom edge, or under 3 pixels, gets confidence 0.
    """
    offset = F.pad(corners.to(predictions.dtype) * stride, (0, 2)).unsqueeze(-2)
    boxes = predictions[..., :4] * (PATCH_SIDE * stride) + offset
    outside = (boxes[..., :2] >= sizes.flip(-1)).any(dim=-1)
    small = (boxes[..., 2:] < SMALLEST_ANCHOR).any(dim=-1)
    confidence = torch.where(outside | small, 0.0, predictions[..., 4].sigmoid())
    return torch.cat((boxes, confidence.unsqueeze(-1)), dim=-1)
