"""Token selection against plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asag.ops import select_tokens
from tests.trt_plugins.kernel_cases import scores_with_ties


def slow_selection(scores: list[float], count: int, capacity: int) -> list[int]:
    """One image's indices, by a sort with a key."""

    def key(token: int) -> tuple[float, int]:
        score = scores[token]
        if math.isnan(score):
            score = -math.inf
        return (0.0 if abs(score) < 2.0**-126 else -score), token

    chosen = sorted(sorted(range(len(scores)), key=key)[: min(count, capacity)])
    return (chosen + [token for token in range(len(scores)) if token not in chosen])[:capacity]


@given(st.integers(1, 3), st.integers(1, 40), st.data(), st.integers(0, 2**32 - 1))
def test_against_plain_python(batch: int, tokens: int, data: st.DataObject, seed: int) -> None:
    """Equal scores, infinities and what is no number; no token, all tokens, and more than there are places."""
    capacity = data.draw(st.integers(1, tokens))
    counts = data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    scores = scores_with_ties(seed, batch, tokens)
    indices, active = select_tokens(torch.from_numpy(scores), torch.tensor(counts), capacity)
    assert indices.dtype == torch.int64
    for image, count in enumerate(counts):
        assert indices[image].tolist() == slow_selection(scores[image].tolist(), count, capacity)
        assert active[image].tolist() == [place < count for place in range(capacity)]
        assert len(set(indices[image].tolist())) == capacity


def test_counts_may_be_of_another_whole_type_and_scores_need_gradients() -> None:
    scores = torch.tensor([[0.1, 0.4, -0.2, 0.3]], requires_grad=True)
    indices, active = select_tokens(scores, torch.tensor([2], dtype=torch.int32), 3)
    assert (indices.tolist(), active.tolist()) == ([[1, 3, 0]], [[True, True, False]])


@pytest.mark.parametrize("capacity", [0, 5])
def test_fewer_tokens_than_places_are_refused(capacity: int) -> None:
    def refused() -> tuple[Tensor, Tensor]:
        return select_tokens(torch.zeros(1, 4), torch.tensor([1]), capacity)

    with pytest.raises(ValueError, match=f"4 tokens cannot fill {capacity} places"):
        refused()
