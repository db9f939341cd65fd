"""ResNet-50 at 800x1344 on real photographs, through the commands as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asag.checkpoint import CheckpointInfo, save_detector
from asag.cli.main import main
from asag.datasets import COCO_CATEGORIES
from asag.detector import build_detector
from asag.families import find_preset
from asag.published import load_published
from tests.golden_files import module

pytestmark = pytest.mark.slow

PRESET = "asag-a-r50-1x-100"
IMAGES = 2
OPTIONS = ("--no-batch-check",)
"""Batches are checked on small images, in the same way; here they would take minutes."""


def run(*arguments: str | Path) -> int:
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    return int(exited.value.code or 0)


@pytest.fixture(scope="module")
def models(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with the reference weights, which probe P4 and P3, and its exported file."""
    folder = tmp_path_factory.mktemp("r50")
    shapes = json.loads((goldens / "asag_a_r50_100.shapes.json").read_text())
    preset = find_preset(PRESET)
    detector = build_detector(preset.config)
    load_published(detector, module(goldens).golden_state_dict(shapes))
    checkpoint, exported = folder / "r50.safetensors", folder / "r50.onnx"
    save_detector(checkpoint, detector, CheckpointInfo.of(preset, COCO_CATEGORIES))
    assert run("export", checkpoint, "-o", exported) == 0
    return checkpoint, exported


def test_exported_file_is_small_enough(models: tuple[Path, Path]) -> None:
    assert models[1].stat().st_size <= 260e6


def test_parity(models: tuple[Path, Path], coco_tiny: Path, tmp_path: Path) -> None:
    numbers = tmp_path / "parity.json"
    code = run("parity", *models, "--data", coco_tiny, "--images", str(IMAGES), "--json", numbers, "--check", *OPTIONS)
    rows = json.loads(numbers.read_text())["rows"]
    agreement = rows[1]["agreement"]
    assert code == 0
    assert agreement["images_within"] == agreement["images"] == IMAGES
    assert agreement["matched"] >= 50 * IMAGES
    assert agreement["unmatched"] == 0
    assert abs(rows[1]["ap_difference"]) < 5e-4


def test_detect(models: tuple[Path, Path], coco_tiny: Path, tmp_path: Path) -> None:
    photographs = sorted((coco_tiny / "val2017").glob("*.jpg"))[:IMAGES]
    options = ("-o", tmp_path, "--score-threshold", "0", "--batch-size", str(IMAGES))
    assert run("detect", *photographs, "--model", models[1], *options) == 0
    content = json.loads((tmp_path / "images.json").read_text())
    detections = json.loads((tmp_path / "detections.json").read_text())
    assert [Path(image["file_name"]).name for image in content["images"]] == [path.name for path in photographs]
    assert len(detections) == 100 * IMAGES
    assert {record["category_id"] for record in detections} <= set(COCO_CATEGORIES)
    assert all((tmp_path / image["picture"]).is_file() for image in content["images"])


def test_evaluate(models: tuple[Path, Path], coco_tiny: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    assert run("evaluate", models[1], "--data", coco_tiny, "--images", str(IMAGES), "--json", result) == 0
    assert 0 <= json.loads(result.read_text())["ap"] <= 1


def test_engine_builds_for_dynamic_batch(models: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    engine = tmp_path / "r50.engine"
    assert run("build", models[1], "-o", engine, "--batch", "1:4") == 0
    manifest = json.loads(Path(f"{engine}.json").read_text())
    assert engine.stat().st_size > 100e6
    assert manifest["profiles"] == [[1, 1, 1], [2, 4, 4]]
