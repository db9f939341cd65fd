"""ONNX Runtime on a CPU with several batches at once."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from asag.runtime.opening import open_session


@pytest.fixture
def images() -> list[NDArray[np.uint8]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (30 + number, 50, 3), np.uint8) for number in range(9)]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_several_contexts_give_what_one_gives(toy_onnx: Path, images: list[NDArray], batch_size: int) -> None:
    with open_session(toy_onnx, threads=1) as one, open_session(toy_onnx, threads=2, contexts=2) as two:
        expected, found = one.detect(images, batch_size), two.detect(images, batch_size)
    assert [detections.image_size for detections in found] == [(30 + number, 50) for number in range(9)]
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours.scores, theirs.scores)
        assert np.array_equal(ours.boxes, theirs.boxes)


def test_two_batches_run_at_once(toy_onnx: Path, images: list[NDArray], monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=30)
    with open_session(toy_onnx, threads=2, contexts=2) as session:
        run = session.run

        def meeting_run(tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
            both.wait()  # breaks unless another run is there at the same time
            return run(tensors)

        monkeypatch.setattr(session, "run", meeting_run)
        assert len(session.detect(images[:8])) == 8


def test_what_a_run_raises_arrives(toy_onnx: Path, images: list[NDArray], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_run(tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        raise ValueError("it failed")

    with open_session(toy_onnx, threads=2, contexts=2) as session:
        monkeypatch.setattr(session, "run", failing_run)
        with pytest.raises(ValueError, match="it failed"):
            session.detect(images)


def test_submitted_tensors_may_change(toy_onnx: Path) -> None:
    tensors = {"images": np.full((1, 3, 64, 96), 200, np.uint8), "sizes": np.array([[64, 96]], np.float32)}
    with open_session(toy_onnx, threads=2, contexts=2) as session:
        expected = session.run(tensors)
        blockers = [session.submit(tensors) for _ in range(6)]
        pending = session.submit(tensors)
        tensors["images"][:] = 0
        assert np.array_equal(pending.result()["scores"], expected["scores"])
        assert all(np.array_equal(blocker.result()["scores"], expected["scores"]) for blocker in blockers)
