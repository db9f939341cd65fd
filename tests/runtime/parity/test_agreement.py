from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asag.runtime.parity.agreement import compare_detections, differing
from asag.runtime.postprocessing import Detections


def random_detections(seed: int, count: int, levels: int | None = None) -> Detections:
    """Detections by falling score; ``levels`` restricts the scores to that many values."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 200, (count, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(5, 60, (count, 2))], axis=1).astype(np.float32)
    scores = generator.uniform(0.05, 1, count) if levels is None else generator.integers(1, levels + 1, count) / levels
    order = np.argsort(-scores, kind="stable")
    labels = generator.integers(1, 4, count)
    return Detections(boxes[order], scores[order].astype(np.float32), labels[order], 0, (300, 300))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 30))
def test_equal_lists_agree_wholly(seed: int, count: int) -> None:
    found = random_detections(seed, count)
    agreement = compare_detections(1, found, found, 100)
    assert agreement.within(0, 0)
    assert (agreement.matched, agreement.cut_ties, agreement.swaps) == (count, 0, 0)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 30))
def test_what_differs_is_named_and_what_is_missing(seed: int, count: int) -> None:
    reference = random_detections(seed, count)
    scores = reference.scores.copy()
    scores[1] += 0.01
    candidate = dataclasses.replace(reference, scores=scores).select(np.arange(count) != 2)
    missing, different = differing(reference, candidate)
    assert missing.sum() == 1
    # The lost one's partner may be taken by a neighbour of its class, which differs then, and so on.
    assert different.sum() >= 1
    assert not differing(reference, reference)[0].any()
    assert not differing(reference, reference)[1].any()


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_small_noise_is_measured(seed: int, count: int) -> None:
    reference = random_detections(seed, count)
    generator = np.random.default_rng(seed + 1)
    score_noise = generator.uniform(-5e-5, 5e-5, count)
    box_noise = generator.uniform(-0.02, 0.02, (count, 4))
    candidate = dataclasses.replace(
        reference,
        scores=(reference.scores + score_noise).astype(np.float32),
        boxes=(reference.boxes + box_noise).astype(np.float32),
    )
    agreement = compare_detections(1, reference, candidate, 100)
    assert agreement.matched == count
    assert agreement.within()
    assert agreement.score_difference == pytest.approx(np.abs(score_noise).max(), abs=1e-6)
    assert agreement.box_difference == pytest.approx(np.abs(box_noise).max(), abs=1e-4)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_order_within_equal_scores_does_not_matter(seed: int, count: int) -> None:
    reference = random_detections(seed, count, levels=3)
    shuffled = np.random.default_rng(seed).permutation(count)
    shuffled = shuffled[np.argsort(-reference.scores[shuffled], kind="stable")]
    agreement = compare_detections(1, reference, reference.select(shuffled), 100)
    assert agreement.within(0, 0)
    assert agreement.swaps == (shuffled != np.arange(count)).sum()


def test_missing_and_extra_detections_are_unmatched() -> None:
    reference = random_detections(3, 20)
    missing = reference.select(np.delete(np.arange(20), 4))
    agreement = compare_detections(1, reference, missing, 100)
    assert (agreement.matched, agreement.unmatched_reference, agreement.unmatched_candidate) == (19, 1, 0)
    assert not agreement.within()
    agreement = compare_detections(1, missing, reference, 100)
    assert (agreement.unmatched_reference, agreement.unmatched_candidate) == (0, 1)


def test_another_label_is_another_detection() -> None:
    reference = random_detections(4, 10)
    changed = dataclasses.replace(reference, labels=np.where(np.arange(10) == 2, 99, reference.labels))
    agreement = compare_detections(1, reference, changed, 100)
    assert (agreement.unmatched_reference, agreement.unmatched_candidate) == (1, 1)


def test_equal_scores_at_the_cut_are_ties() -> None:
    pool = random_detections(5, 12)
    scores = pool.scores.copy()
    scores[9:] = scores[9]
    pool = dataclasses.replace(pool, scores=scores)
    reference, candidate = pool.select(np.arange(10)), pool.select(np.array([*range(9), 11]))
    agreement = compare_detections(1, reference, candidate, max_detections=10)
    assert (agreement.cut_ties, agreement.unmatched_reference, agreement.unmatched_candidate) == (2, 0, 0)
    assert agreement.within()
    assert compare_detections(1, reference, candidate, 100, suppressed=True).cut_ties == 2
    # A list that was not cut has no reason to lack its last detection.
    shorter = reference.select(np.arange(9))
    assert compare_detections(1, reference, shorter, max_detections=10).unmatched_reference == 1
    # The same lists, not cut: the difference is real.
    agreement = compare_detections(1, reference, candidate, max_detections=100)
    assert (agreement.cut_ties, agreement.unmatched_reference, agreement.unmatched_candidate) == (0, 1, 1)


def test_boxes_without_area_still_match() -> None:
    found = Detections(
        np.array([[5, 5, 5, 9]], np.float32), np.array([0.5], np.float32), np.array([1], np.int64), 0, (10, 10)
    )
    assert compare_detections(1, found, found, 100).matched == 1
