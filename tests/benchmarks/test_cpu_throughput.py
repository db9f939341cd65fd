from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from asag.runtime import open_session
from asag.runtime.parity.agreement import compare_detections
from benchmarks import cpu_speed
from benchmarks.cpu_throughput import FolderTimes, compare_on_folder, measure_folder, one_by_one, throughput_table
from tests.builders import random_picture, small_info
from tests.exports import small_export


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.fromarray(random_picture(number, 150, 180)).save(path)
    return paths


@pytest.mark.slow
def test_variants_are_timed_and_detect_the_same(
    tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_export().instead_of_exporting(monkeypatch)
    checkpoint = small_export().checkpoint(tmp_path / "small.safetensors")
    monkeypatch.setattr(cpu_speed, "INPUT_SIZE", small_info().input.size)
    found = compare_on_folder(checkpoint, tmp_path, pictures, rounds=2, images=3, threads=2)
    assert [times.name.partition(",")[0] for times in found] == ["PyTorch eager", "PyTorch eager", "ONNX Runtime"]
    assert all(len(times.wall) == 2 and min(times.wall + times.processor) > 0 for times in found)
    with open_session(checkpoint) as reference, open_session(tmp_path / "small.onnx", contexts=2) as exported:
        for ours, theirs in zip(exported.detect(pictures), one_by_one(reference, pictures), strict=True):
            assert compare_detections(0, theirs, ours, 100).within()


def test_every_variant_gets_the_same_images_each_round(pictures: list[Path]) -> None:
    calls: list[tuple[str, list[str]]] = []

    def called(name: str) -> object:
        def variant(some: Sequence[Path]) -> None:
            calls.append((name, [path.stem for path in some]))

        return variant

    measure_folder({name: called(name) for name in "ab"}, pictures, rounds=2, images=2)  # type: ignore[misc]
    assert calls[2:] == [("a", ["2", "0"]), ("b", ["2", "0"]), ("b", ["1", "2"]), ("a", ["1", "2"])]


def test_ratios_are_those_of_rounds() -> None:
    console = Console(width=100, record=True)
    console.print(
        throughput_table(
            [
                FolderTimes("one", (1.0, 4.0, 9.0), (3.0, 3.0, 3.0)),
                FolderTimes("detect", (1.0, 2.0, 3.0), (1.0, 1.0, 1.0)),
            ]
        )
    )
    text = console.export_text()
    rows = [line.split() for line in text.splitlines() if "(" in line]
    assert rows == [["one", "0.25", "3.00", "2.00", "(1.20..2.80)"], ["detect", "0.50", "1.00", "1.00", "(1.00..1.00)"]]
