from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import cpu_speed
from benchmarks.cpu_speed import INPUT_SIZE, compare_variants, measure_detect, random_images, ratio_lines
from runtime import open_session
from runtime.parity.agreement import compare_detections
from tests.builders import random_picture, small_info
from tests.exports import small_export


@pytest.mark.slow
def test_variants_take_turns_and_detect_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_export().instead_of_exporting(monkeypatch)
    checkpoint = small_export().checkpoint(tmp_path / "small.safetensors")
    picture = tmp_path / "picture.png"
    Image.fromarray(random_picture(0, 150, 180)).save(picture)
    monkeypatch.setattr(cpu_speed, "INPUT_SIZE", small_info().input.size)
    model, report = compare_variants(checkpoint, tmp_path, [picture], rounds=3, warmup=1, threads=1)
    assert [latency.backend for latency in report.latencies] == ["pytorch", "pytorch", "onnxruntime-cpu"]
    assert all(len(latency.rounds_ms) == 3 and min(latency.rounds_ms) > 0 for latency in report.latencies)
    (expected,), (found,) = (open_session(path).detect([picture]) for path in (checkpoint, model))
    assert compare_detections(0, expected, found, 100).within()

    known = zip(report.latencies, [(100.0, 200.0, 400.0), (80.0, 100.0, 400.0), (40.0, 50.0, 200.0)], strict=True)
    lines = ratio_lines(
        dataclasses.replace(report, latencies=tuple(dataclasses.replace(one, rounds_ms=times) for one, times in known))
    )
    assert [line.partition(" (10..90")[0].rpartition(" ")[2] for line in lines] == ["0.50", "0.40", "0.80"]

    process = measure_detect(model, picture, tmp_path / "out", threads=1)
    assert (tmp_path / "out" / "detections.json").is_file()
    assert process.seconds > 0
    assert model.stat().st_size < process.peak_bytes < 1.5e9


def test_a_failed_command_is_reported(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("nothing")
    with pytest.raises(RuntimeError, match=r"asag detect failed: .*model\.onnx"):
        measure_detect(tmp_path / "model.onnx", tmp_path / "none.png", tmp_path / "out")


def test_pictures_fill_the_input(tmp_path: Path) -> None:
    for path in random_images(tmp_path, count=2):
        with Image.open(path) as image:  # type: ignore[arg-type]
            assert (image.height, image.width) == INPUT_SIZE
