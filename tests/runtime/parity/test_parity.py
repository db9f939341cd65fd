from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from asag.runtime import open_session
from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.parity.comparison import ParityReport, Unavailable, compare, open_candidate, parity_table
from tests.runtime.toy_detector import ToySession, toy_metadata

UNAVAILABLE = Unavailable("toy.engine", "tensorrt-rtx", "fp16", "no NVIDIA driver on this machine")


def rendered(report: ParityReport, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(parity_table(report))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_equal_backends(toy_dataset: CocoFolder, toy_onnx: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = compare(
        ToySession(),
        [UNAVAILABLE, open_session(toy_onnx)],
        toy_dataset,
        progress=lambda done, count: calls.append((done, count)),
    )
    reference, unavailable, candidate = report.rows
    assert reference.agreement is None
    assert reference.ap_difference is None
    assert (unavailable.reason, unavailable.result, unavailable.latency_p50_ms) == (UNAVAILABLE.reason, None, None)
    assert report.detections[1] is None
    assert candidate.ap_difference == 0
    assert report.agrees
    assert candidate.agreement is not None
    assert candidate.agreement.images_within == candidate.agreement.images == 4
    assert candidate.agreement.matched == 64
    assert candidate.agreement.unmatched == 0
    assert candidate.latency_p50_ms is not None
    assert 0 < candidate.latency_p50_ms <= (candidate.latency_p95_ms or 0)
    assert calls[-1] == (4, 4)
    values = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert values["rows"][0]["result"]["apl"] is None
    assert values["rows"][1]["reason"] == UNAVAILABLE.reason
    text = rendered(report)
    assert "not run" in text
    assert UNAVAILABLE.reason in text
    assert "onnxruntime-cpu" in text


def test_a_changed_backend_is_seen(toy_dataset: CocoFolder) -> None:
    def dim_one_cell(outputs: dict[str, np.ndarray]) -> None:
        outputs["scores"][:, 5] += 0.01

    def lose_half(outputs: dict[str, np.ndarray]) -> None:
        outputs["scores"][:, ::2] = 0

    report = compare(ToySession(), [ToySession(change=dim_one_cell), ToySession(change=lose_half)], toy_dataset)
    _, dimmed, halved = report.rows
    assert dimmed.agreement is not None
    assert halved.agreement is not None
    assert dimmed.agreement.score_difference == pytest.approx(0.01, abs=1e-5)
    assert dimmed.agreement.box_difference == 0
    assert dimmed.agreement.images_within == 0
    assert halved.agreement.unmatched == 32
    assert not report.agrees
    assert halved.ap_difference is not None
    assert halved.ap_difference < 0


def test_every_backend_sees_each_image_once_after_warming_up(toy_dataset: CocoFolder) -> None:
    sessions = [ToySession(), ToySession()]
    report = compare(sessions[0], sessions[1:], toy_dataset, images=3, batch_sizes=())
    assert report.image_ids == toy_dataset.image_ids[:3]
    assert [len(session.calls) for session in sessions] == [4, 4]


def test_sessions_that_cannot_be_compared(toy_dataset: CocoFolder) -> None:
    other_size = ToySession(toy_metadata(shorter_side=32), name="other")
    with pytest.raises(ValueError, match="other and toy differ in shorter_side"):
        compare(ToySession(), [other_size], toy_dataset)
    with pytest.raises(ValueError, match="at least 1"):
        compare(ToySession(), [], toy_dataset, images=0)
    foreign = toy_metadata(category_ids=(1, 2, 3))
    with pytest.raises(ValueError, match="the model's classes"):
        compare(ToySession(foreign), [], toy_dataset)


def test_a_backend_that_is_not_there_is_named_with_its_reason(toy_onnx: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    candidate = open_candidate(toy_onnx, device="cuda:0")
    assert isinstance(candidate, Unavailable)
    assert (candidate.name, candidate.backend) == ("toy.onnx", "onnxruntime-cuda")
    assert "has no CUDA" in candidate.reason
    with pytest.raises(FileNotFoundError):
        open_candidate(toy_onnx.with_name("none.onnx"))
