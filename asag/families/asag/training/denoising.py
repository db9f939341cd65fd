"""Denoising: extra queries made from noised objects, for ASAG-A-dn (after DN-DETR, CVPR 2022).

The slots of an image hold its objects, repeated as often as fits; slot i belongs to object i mod n. One repetition is
a *group*. The slots left over after the last whole repetition are padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asag.training.assignment import Matches
from asag.training.protocol import Target
from asag.training.randomness import Generators, generator_of
from asag.training.transfer import to_device

SLOTS = 200
"""Noised queries of an image."""
PADDING_GROUP = -1


@dataclass(frozen=True)
class NoisedQueries:
    """`boxes` [B, S, 4] float32 `cxcywh`, fractions of the content; `group` [B, S] int64, the repetition that a
    slot belongs to, -1 for padding. Padding slots hold the whole content, a box that is safe to compute with."""

    boxes: Tensor
    group: Tensor

    @property
    def valid(self) -> Tensor:
        """[B, S] bool, False for padding."""
        return self.group != PADDING_GROUP


def noise_scale(epoch: int, start: float, fall: float) -> float:
    """`start - fall * epoch` (epochs from 0, never under 0).

    The method trains with 0.4 throughout, or with 0.8 falling by 0.04.
    """
    return max(start - fall * epoch, 0.0)


def assign_slots(counts: Sequence[int], slots: int) -> tuple[Tensor, Tensor]:
    """Object [B, S] and group [B, S] (-1: padding) of every slot, int64, for images of `counts` objects.

    An image without objects, or with more objects than slots, gets padding alone.
    """
    count = torch.tensor(counts, dtype=torch.int64).reshape(-1, 1)
    several = count.clamp(min=1)
    slot = torch.arange(slots).expand(len(counts), -1)
    used = (slot < slots // several * several) & (count > 0)
    return slot % several, torch.where(used, slot // several, PADDING_GROUP)


def noised_queries(targets: Sequence[Target], scale: float, generator: Generators = None) -> NoisedQueries:
    """Repeat and move each image's `boxes` [n, 4] (`cxcywh`, fractions of the content).

    The centre moves uniformly by up to `scale` times half the size, the size by up to `scale` times itself; the
    four numbers are then clamped to [0, 1]. `generator`: one for all images, or one for each. All is drawn and
    computed on the CPU, where the result is, so the same generator gives the same queries for every device.
    """
    objects, group = assign_slots([len(target["boxes"]) for target in targets], SLOTS)
    boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(len(targets), SLOTS, 1)
    noise = [_draw(generator_of(generator, image)) for image in range(len(targets))]
    for image, target in enumerate(targets):
        used = group[image] != PADDING_GROUP
        clean = target["boxes"].to("cpu", torch.float32)[objects[image, used]]
        reach = torch.cat([clean[:, 2:] / 2, clean[:, 2:]], 1)
        boxes[image, used] = (clean + noise[image][used] * scale * reach).clamp(0, 1)
    return NoisedQueries(boxes, group)


def _draw(generator: torch.Generator | None) -> Tensor:
    """Uniform numbers from -1 to 1, [SLOTS, 4]."""
    drawn_on = generator.device if generator is not None else None
    return torch.rand(SLOTS, 4, generator=generator, device=drawn_on).cpu() * 2 - 1


def denoising_attention_mask(group: Tensor, valid: Tensor) -> Tensor:
    """Which pairs self-attention may *not* use, [B, S+Q, S+Q] bool (row: the one that looks, column: looked at).

    `group` [B, S] as in `NoisedQueries`, `valid` [B, Q] the ordinary queries that are real; the noised queries
    come first. A noised query sees its own group and the ordinary queries, an ordinary query sees ordinary ones
    alone, and nothing sees padding. A padding slot sees the ordinary queries, which keeps its softmax finite.
    """
    same = (group[:, :, None] == group[:, None, :]) & (group != PADDING_GROUP)[:, None, :]
    slots, ordinary = group.shape[1], valid.shape[1]
    seen_by_all = valid[:, None, :].expand(-1, slots + ordinary, -1)
    none = same.new_zeros(len(group), ordinary, slots)
    return ~torch.cat([torch.cat([same, none], 1), seen_by_all], 2)


def repetition_matches(counts: Sequence[int], slots: int, device: torch.device) -> tuple[Tensor, Matches]:
    """The fixed assignment of the noised queries: which slots count, [B, S] bool, and the object of each of them."""
    objects, group = assign_slots(counts, slots)
    valid = group != PADDING_GROUP
    image, slot = valid.nonzero(as_tuple=True)
    pairs = to_device(torch.stack([image, slot, objects[image, slot]]), device)
    return to_device(valid, device), Matches(*pairs.unbind(0))
