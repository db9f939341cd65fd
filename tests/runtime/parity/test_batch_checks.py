from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from asag.runtime import open_session
from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.parity.batch_checks import check_batches
from asag.runtime.parity.comparison import compare
from tests.runtime.toy_detector import ToySession, build_toy_model, toy_metadata

IMAGES = [np.random.default_rng(seed).integers(1, 255, (64, 96, 3), np.uint8) for seed in range(5)]


def second_row_brighter(outputs: dict[str, NDArray]) -> None:
    outputs["scores"][1::2, 3] += 0.01


def depends_on_the_batch(outputs: dict[str, NDArray]) -> None:
    outputs["boxes"] += 0.01 * (len(outputs["boxes"]) - 1)


def overflows(outputs: dict[str, NDArray]) -> None:
    outputs["scores"][:] = np.nan


def test_a_sound_model_passes_at_every_size(toy_onnx: Path) -> None:
    for session in (ToySession(), open_session(toy_onnx)):
        checks = check_batches(session, IMAGES)
        assert [(check.kind, check.batch) for check in checks] == [
            ("copies", 2),
            ("batch size", 2),
            ("copies", 4),
            ("batch size", 4),
        ]
        assert all(check.agrees and check.compared for check in checks)
        assert all("same as" in check.sentence() for check in checks)


def test_rows_of_equal_images_that_differ_are_found() -> None:
    copies, batches, *_ = check_batches(ToySession(change=second_row_brighter), IMAGES, (1, 2))
    assert not copies.agrees
    assert copies.differing == (1,)
    assert copies.score_difference == pytest.approx(0.01, abs=1e-5)
    assert "differs from each other at place 1" in copies.sentence()
    assert not batches.agrees
    assert batches.differing == (1,), "with two images and pairs, only the second is ever in the second place"


def test_results_that_depend_on_the_batch_size_are_found() -> None:
    checks = check_batches(ToySession(change=depends_on_the_batch), IMAGES, (1, 2, 4))
    assert [check.agrees for check in checks] == [True, False, True, False]
    assert checks[-1].differing == (0, 1, 2, 3)
    assert checks[-1].box_difference == pytest.approx(0.03 * 96, abs=1e-3)


def test_outputs_that_are_no_numbers_do_not_pass_for_equal() -> None:
    (copies, _) = check_batches(ToySession(change=overflows), IMAGES, (2,))
    assert copies.not_finite == 2 * 16
    assert not copies.agrees
    assert "not finite" in copies.sentence()


def test_the_model_bounds_the_sizes(tmp_path: Path) -> None:
    session = ToySession(max_batch=3)
    assert [check.batch for check in check_batches(session, IMAGES)] == [2, 2]
    assert max(session.calls) == 2
    fixed = tmp_path / "fixed.onnx"
    onnx.save(build_toy_model(toy_metadata(), batch=1), fixed)
    (check,) = check_batches(open_session(fixed), IMAGES)
    assert "at most 1 image" in check.sentence()
    assert check.agrees
    with pytest.raises(ValueError, match="at least one image"):
        check_batches(session, [])


def test_parity_checks_every_model_that_runs(toy_dataset: CocoFolder) -> None:
    report = compare(ToySession(), [ToySession(change=second_row_brighter, name="broken")], toy_dataset)
    assert [check.name for check in report.batch_checks if not check.agrees] == ["broken"] * 4
    assert report.agrees, "one image at a time the two are the same"
    assert not report.batches_agree
    assert report.to_json()["batch_checks"][0]["agrees"] is True
    assert compare(ToySession(), [], toy_dataset, batch_sizes=()).batch_checks == ()
