from __future__ import annotations

import numpy as np
import pytest

from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.parity.budgets import Budgets, over_budget
from asag.runtime.parity.comparison import ParityReport, Unavailable, compare
from tests.runtime.toy_detector import ToySession


def worse(outputs: dict[str, np.ndarray]) -> None:
    outputs["scores"][:, ::2] *= 0.5
    outputs["scores"][:, 1] = 0
    outputs["boxes"][:, 5] += 0.02


@pytest.fixture
def report(toy_dataset: CocoFolder) -> ParityReport:
    return compare(ToySession(), [ToySession(change=worse, name="worse")], toy_dataset, batch_sizes=())


def test_numbers_behind_the_budgets(report: ParityReport) -> None:
    reference, worse = report.rows
    assert worse.agreement is not None
    assert worse.agreement.share_iou_90 == pytest.approx(14 / 16)
    assert worse.agreement.share_iou_99 == pytest.approx(14 / 16)
    assert sum(worse.agreement.score_histogram) == worse.agreement.matched
    assert worse.agreement.score_quantiles[-1] == pytest.approx(worse.agreement.score_difference)
    assert worse.ap_interval is not None
    assert worse.ap_difference_interval is not None
    assert worse.differences is not None
    assert worse.differences["ap"] == worse.ap_difference
    assert worse.ap_difference_interval.low <= (worse.ap_difference or 0) <= worse.ap_difference_interval.high
    assert reference.ap_difference_interval is None


@pytest.mark.parametrize(
    ("budgets", "named"),
    [
        (Budgets(), None),
        (Budgets(ap_drop=1.0, score_difference=0.6, box_difference=10, unmatched=4, share_iou_90=0.8), None),
        (Budgets(ap_drop=0.0001), "AP drop"),
        (Budgets(score_difference=0.1), "largest score difference"),
        (Budgets(box_difference=0.5), "largest box difference"),
        (Budgets(unmatched=3), "unmatched detections 4"),
        (Budgets(share_iou_90=0.9), "share of detections"),
        (Budgets(latency_ratio=1e-6), "latency"),
    ],
)
def test_each_budget_is_kept_or_named(report: ParityReport, budgets: Budgets, named: str | None) -> None:
    lines = over_budget(report, budgets)
    assert len(lines) == (named is not None)
    if named is not None:
        assert named in lines[0]
        assert "worse (numpy fp32)" in lines[0]


def test_a_candidate_that_did_not_run_keeps_no_budget(toy_dataset: CocoFolder) -> None:
    missing = Unavailable("toy.engine", "tensorrt-rtx", "fp16", "no driver")
    report = compare(ToySession(), [missing], toy_dataset, batch_sizes=())
    (line,) = over_budget(report, Budgets(ap_drop=0.1))
    assert "no driver" in line
    assert over_budget(report, Budgets()) == []
