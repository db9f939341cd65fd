"""SelectTokens: the tokens that a sparse encoder refines.

Roh et al., "Sparse DETR: Efficient End-to-End Object Detection with Learnable Sparsity", section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select_tokens_definition(scores: Tensor, counts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Each image's `counts` tokens of largest score, in K = `capacity` places.

    scores: [B, T]; counts: [B], whole numbers, at most K count. Returns indices [B, K] int64 and active [B, K] bool.
    Of equal scores the lower index is chosen. The chosen tokens come first, by rising index; the other places, not
    active, hold the lowest indices that were not chosen, so that a row's indices are distinct. NaN counts as the
    smallest score, and what is smaller than the smallest normal number of float32 (1.2e-38) as zero.
    Raises ValueError where there are fewer tokens than places.
    """
    tokens = scores.shape[1]
    if not 0 < capacity <= tokens:
        raise ValueError(f"{tokens} tokens cannot fill {capacity} places")
    small = scores.abs() < torch.finfo(torch.float32).tiny
    scores = scores.masked_fill(small, 0).masked_fill(scores.isnan(), -torch.inf)
    position = torch.arange(tokens, device=scores.device)
    within = position < counts.clamp(max=capacity).unsqueeze(1)
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(within).scatter(1, by_score, within)
    indices = chosen.int().argsort(dim=1, descending=True, stable=True)
    return indices[:, :capacity].contiguous(), within[:, :capacity].contiguous()


@torch.library.custom_op("asag::select_tokens", mutates_args=())
def _select_tokens(scores: Tensor, counts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    return select_tokens_definition(scores, counts, capacity)


@_select_tokens.register_fake
def _(scores: Tensor, counts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    shape = scores.shape[0], capacity
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape, dtype=torch.bool)


def select_tokens(scores: Tensor, counts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """:func:`select_tokens_definition`, as one op. A choice has no gradient."""
    indices, active = torch.ops.asag.select_tokens(scores.detach().float(), counts.long(), capacity)
    return indices, active
