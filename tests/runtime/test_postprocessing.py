from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asag.runtime.errors import BackendUnavailableError
from asag.runtime.postprocessing import Detections, box_iou, non_maximum_suppression, postprocess
from tests.runtime.toy_detector import toy_metadata


def random_detections(seed: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(5, 60, (count, 2))], axis=1).astype(np.float32)
    scores = generator.integers(1, 20, count).astype(np.float32) / 20  # many equal scores
    return boxes, scores, generator.integers(1, 4, count)


def test_box_iou_by_hand() -> None:
    boxes = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 5, 5]], float)
    assert np.allclose(box_iou(boxes, boxes), [[1, 1 / 7, 0], [1 / 7, 1, 0], [0, 0, 0]])


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 40), st.sampled_from([0.3, 0.5, 0.7]))
def test_suppression_is_greedy(seed: int, count: int, threshold: float) -> None:
    boxes, scores, labels = random_detections(seed, count)
    kept = non_maximum_suppression(boxes, scores, labels, threshold)
    assert np.all(np.diff(scores[kept]) <= 0)
    conflicts = (box_iou(boxes, boxes) > threshold) & (labels[:, None] == labels[None, :])
    assert not np.any(conflicts[np.ix_(kept, kept)] & ~np.eye(len(kept), dtype=bool))
    for index in np.setdiff1d(np.arange(count), kept):
        assert any(conflicts[index, other] and scores[other] >= scores[index] for other in kept)


def outputs_of(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, overflow: int = 0) -> dict[str, np.ndarray]:
    return {"boxes": boxes[None], "scores": scores[None], "labels": labels[None], "overflow": np.array([overflow])}


def test_boxes_are_scaled_to_the_original_image() -> None:
    boxes = np.array([[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.5, 0.5]], np.float32)
    outputs = outputs_of(boxes, np.array([0.4, 0.9], np.float32), np.array([3, 1]), overflow=5)
    (found,) = postprocess(outputs, [(200, 400)], toy_metadata())
    assert found.boxes.tolist() == [[0, 0, 200, 100], [100, 100, 300, 200]]
    assert found.labels.tolist() == [1, 3]
    assert found.overflow == 5
    assert found.image_size == (200, 400)
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)
    assert len(found.above(0.5)) == 1


def test_padding_and_non_finite_entries_are_left_out() -> None:
    boxes = np.tile(np.array([0.1, 0.1, 0.2, 0.2], np.float32), (5, 1))
    boxes[3, 2] = np.nan
    scores = np.array([0.9, 0.0, np.nan, 0.8, 0.1], np.float32)
    (found,) = postprocess(outputs_of(boxes, scores, np.ones(5, np.int64)), [(10, 10)], toy_metadata())
    assert np.allclose(found.scores, [0.9, 0.1])
    (found,) = postprocess(
        outputs_of(boxes, scores, np.ones(5, np.int64)), [(10, 10)], toy_metadata(), score_threshold=0.5
    )
    assert np.allclose(found.scores, [0.9])


def test_suppression_runs_where_the_model_asks_for_it() -> None:
    boxes = np.array([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.49], [0, 0, 0.5, 0.48]], np.float32)
    outputs = outputs_of(boxes, np.array([0.5, 0.9, 0.7], np.float32), np.array([1, 1, 3]))
    (plain,) = postprocess(outputs, [(100, 100)], toy_metadata())
    assert plain.labels.tolist() == [1, 3, 1]
    (suppressed,) = postprocess(outputs, [(100, 100)], toy_metadata(nms_iou=0.7))
    assert np.allclose(suppressed.scores, [0.9, 0.7])
    assert suppressed.labels.tolist() == [1, 3]


@pytest.mark.parametrize("genuine", [False, True])
def test_detections_for_supervision(genuine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if genuine and importlib.util.find_spec("supervision") is None:
        pytest.skip("supervision is not installed")
    if not genuine:
        monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    boxes, scores, _ = random_detections(seed=3, count=3)
    ours = Detections(boxes, scores, np.array([7, 1, 3]), 0, (90, 120))
    theirs = ours.to_supervision(toy_metadata())
    assert theirs.xyxy.tolist() == boxes.tolist()
    assert theirs.confidence.tolist() == scores.tolist()
    assert theirs.class_id.tolist() == [7, 1, 3]
    assert theirs.data["class_name"].tolist() == ["ring", "circle", "square"]
    nothing = ours.above(2.0).to_supervision(toy_metadata())
    assert nothing.xyxy.shape == (0, 4)
    assert not ours.to_supervision().data


def test_without_supervision_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    detections = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), 0, (9, 9))
    with pytest.raises(BackendUnavailableError, match=r"pip install 'asag\[supervision\]'"):
        detections.to_supervision()
