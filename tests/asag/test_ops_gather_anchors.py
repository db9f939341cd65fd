"""GatherAnchors against its rules (ASAG's README, section 3) written with lists."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asag.ops import gather_anchors, gather_anchors_definition

Anchor = tuple[float, float, float, float, float]


def slow_selection(
    anchors: list[Anchor], selectable: list[bool], first: int, keep_threshold: float, fewest: int, most: int
) -> list[int]:
    """Indices of one image's queries in order; Python's sort keeps the order of equals."""
    confidence = [-1.0 if math.isnan(anchor[4]) else anchor[4] for anchor in anchors]
    kept = [i for i in range(len(anchors)) if selectable[i] and confidence[i] > np.float32(keep_threshold)]
    coarse = [i for i in kept if i < first]
    if len(coarse) < fewest:
        ranked = sorted(range(first), key=lambda i: -confidence[i])[:fewest]
        coarse = [i for i in ranked if confidence[i] >= 0]
    chosen = coarse + [i for i in kept if i >= first]
    if len(chosen) > most:
        chosen = sorted(chosen, key=lambda i: -confidence[i])[:most]
    return chosen


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, float, int, int]:
    """Every rule is hit: few or many pass the threshold, ties, NaN; `most` is never above the number of anchors."""
    batch, total = draw(st.integers(1, 3)), draw(st.integers(4, 30))
    first = draw(st.integers(1, total))
    most = draw(st.integers(1, total))
    fewest = draw(st.integers(1, 6))
    ties = draw(st.booleans())
    scale = draw(st.sampled_from([0.15, 0.3, 1.0]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    anchors = generator.uniform(1, 400, (batch, total, 5)).astype(np.float32)
    values = np.array([0.0, 0.1, 0.2, 0.6, np.nan], np.float32)
    anchors[..., 4] = generator.choice(values, (batch, total)) if ties else generator.random((batch, total)) * scale
    selectable = generator.random((batch, total)) < 0.7
    return torch.from_numpy(anchors), torch.from_numpy(selectable), first, 0.1, fewest, most


@given(cases())
def test_against_lists(case: tuple[Tensor, Tensor, int, float, int, int]) -> None:
    anchors, selectable, *rules = case
    boxes, valid = gather_anchors_definition(anchors, selectable, *rules)
    assert boxes.shape == (*valid.shape, 4)
    for image in range(len(anchors)):
        chosen = slow_selection(anchors[image].tolist(), selectable[image].tolist(), *rules)
        assert valid[image].tolist() == [True] * len(chosen) + [False] * (valid.shape[1] - len(chosen))
        assert torch.equal(boxes[image, : len(chosen)], anchors[image, chosen, :4])
        assert not boxes[image, len(chosen) :].any()


def select(confidence: list[float], selectable: list[bool], first: int, fewest: int, most: int) -> list[int]:
    """Indices of the selected of anchors that carry their index as x."""
    anchors = torch.ones(1, len(confidence), 5)
    anchors[0, :, 0] = torch.arange(len(confidence))
    anchors[0, :, 4] = torch.tensor(confidence)
    boxes, valid = gather_anchors_definition(anchors, torch.tensor([selectable]), first, 0.1, fewest, most)
    return boxes[0, valid[0], 0].int().tolist()


def test_order_of_the_levels_where_no_cut_applied() -> None:
    assert select([0.3, 0.9, 0.05, 0.4, 0.8], [True] * 5, 3, 2, 5) == [0, 1, 3, 4]


def test_threshold_is_exclusive() -> None:
    assert select([0.1, 0.11, 0.5], [True] * 3, 3, 1, 3) == [1, 2]


def test_candidates_come_back_where_fewer_than_the_fewest_remain() -> None:
    """One of two remains on the first level, so its two most confident are taken, the candidate (0.6) included."""
    assert select([0.3, 0.05, 0.6, 0.5], [True, True, False, True], 3, 2, 4) == [2, 0, 3]


def test_fewest_may_lie_under_the_threshold() -> None:
    assert select([0.01, 0.0, 0.02, 0.9], [True] * 3 + [False], 3, 3, 4) == [2, 0, 1]


def test_exactly_the_fewest_is_no_cut() -> None:
    assert select([0.2, 0.6, 0.3], [True, False, True], 3, 2, 3) == [0, 2]


def test_exactly_the_most_is_no_cut() -> None:
    assert select([0.2, 0.6, 0.3], [True] * 3, 3, 1, 3) == [0, 1, 2]
    assert select([0.2, 0.6, 0.3], [True] * 3, 3, 1, 2) == [1, 2]


def test_among_equals_the_first_wins() -> None:
    assert select([0.5] * 6, [True] * 6, 4, 1, 3) == [0, 1, 2]
    assert select([0.05] * 6, [True] * 6, 4, 2, 3) == [0, 1]


def test_nan_is_never_selected() -> None:
    nan = float("nan")
    assert select([nan, 0.5, nan, 0.3, nan], [True] * 5, 3, 3, 5) == [1, 3]
    assert select([nan] * 4, [True] * 4, 4, 2, 4) == []


def test_queries_carry_no_gradient() -> None:
    """Anchors learn from their own loss only (ASAG's README, section 7)."""
    anchors = torch.rand(1, 8, 5, requires_grad=True)
    boxes, _ = gather_anchors(anchors, torch.ones(1, 8, dtype=torch.bool), 8, 0.1, 2, 4)
    assert not boxes.requires_grad
