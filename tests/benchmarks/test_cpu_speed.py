from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from asag.checkpoint import load_detector
from asag.runtime import open_session
from asag.runtime.parity.agreement import compare_detections
from benchmarks import cpu_speed
from benchmarks.cpu_speed import (
    INPUT_SIZE,
    DetectProcess,
    compare_variants,
    detect_line,
    measure_detect,
    random_checkpoint,
    random_images,
    ratio_lines,
)
from tests.builders import random_picture, small_info
from tests.exports import small_export


@pytest.mark.slow
def test_variants_take_turns_and_detect_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_export().instead_of_exporting(monkeypatch)
    checkpoint = small_export().checkpoint(tmp_path / "small.safetensors")
    picture = tmp_path / "picture.png"
    Image.fromarray(random_picture(0, 150, 180)).save(picture)
    monkeypatch.setattr(cpu_speed, "INPUT_SIZE", small_info().input.size)
    (model, _), report = compare_variants(
        [checkpoint, checkpoint], tmp_path, [picture], rounds=3, warmup=1, threads=1, stages=True
    )
    assert [latency.backend for latency in report.latencies] == ["pytorch", "pytorch", "onnxruntime-cpu"] * 2
    assert [times.backend for times in report.stage_times] == ["pytorch", "onnxruntime-cpu"] * 2
    assert all("anchors" in times.p50_ms for times in report.stage_times)
    assert all(len(latency.rounds_ms) == 3 and min(latency.rounds_ms) > 0 for latency in report.latencies)
    (expected,), (found,) = (open_session(path).detect([picture]) for path in (checkpoint, model))
    assert compare_detections(0, expected, found, 100).within()

    times = [(100.0, 200.0, 400.0), (80.0, 100.0, 400.0), (40.0, 50.0, 200.0), (1.0,) * 3, (1.0,) * 3, (400.0,) * 3]
    known = zip(report.latencies, times, strict=True)
    lines = ratio_lines(
        dataclasses.replace(report, latencies=tuple(dataclasses.replace(one, rounds_ms=times) for one, times in known))
    )
    first = [line.partition(" (10..90")[0].rpartition(" ")[2] for line in lines]
    assert first == ["0.50", "0.40", "0.80", "400.00", "400.00", "1.00", "0.12"]
    assert lines[-1].startswith("small.onnx / small.onnx, both ONNX Runtime: ")

    process = measure_detect(model, picture, tmp_path / "out", threads=1)
    assert (tmp_path / "out" / "detections.json").is_file()
    assert process.seconds > 0
    assert model.stat().st_size < process.peak_bytes < 1.5e9


def test_nothing_in_a_random_checkpoint_is_zero(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path, "adamixer-tiny")
    assert path.stem == "adamixer-tiny"
    detector, info = load_detector(path)
    assert info.input.size == INPUT_SIZE
    assert all(parameter.any() for parameter in detector.parameters())


def test_runs_of_the_command_in_a_line() -> None:
    found = [DetectProcess(3.0, 10**9), DetectProcess(1.0, 2 * 10**9), DetectProcess(2.04, 10**9)]
    expected = "one, asag detect, ONNX Runtime: peak memory 2.00 GB, from start to the first detection 2.0 s"
    assert detect_line("one", found) == f"{expected} (of 3: 1.0..3.0 s)"


def test_a_failed_command_is_reported(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("nothing")
    with pytest.raises(RuntimeError, match=r"asag detect failed: .*model\.onnx"):
        measure_detect(tmp_path / "model.onnx", tmp_path / "none.png", tmp_path / "out")


def test_pictures_fill_the_input(tmp_path: Path) -> None:
    for path in random_images(tmp_path, count=2):
        with Image.open(path) as image:  # type: ignore[arg-type]
            assert (image.height, image.width) == INPUT_SIZE
