"""Every command on a tiny random model and four synthetic images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest
from PIL import Image

from asag.deploy import DeployedDetector
from asag.runtime.metadata import ModelMetadata

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Workspace


def test_export(workspace: Workspace) -> None:
    done = workspace.exporting
    assert done.code == 0
    assert done.error == ""
    assert "2 AdaptiveProbing" in done.output
    assert "head main, levels P3P6, patch capacity [6, 8]; left out: " in " ".join(done.output.split())
    metadata = ModelMetadata.from_properties(
        {entry.key: entry.value for entry in onnx.load(workspace.model).metadata_props}
    )
    assert metadata.input_size == (160, 160)
    assert metadata.choices["head"] == "main"


def test_choices_of_export_reach_the_model(
    asag: Command, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = []

    def describe(model: DeployedDetector, path: Path, *_: object) -> None:
        described.append((path, model.describe()))
        raise ValueError("enough")

    monkeypatch.setattr("asag.export.model.export_onnx", describe)
    path = tmp_path / "other.onnx"
    options = ("--input-size", "96x128", "--input-type", "float32", "--head", "aux_2", "--levels", "P4P6")
    done = asag("export", workspace.checkpoint, "-o", path, *options, "--patch-capacity", "3,5")
    assert (done.code, done.error) == (2, "asag: enough\n")
    target, values = described[0]
    assert target == path
    assert (values["input_height"], values["input_width"], values["input_type"]) == (96, 128, "float32")
    assert values["choices"] == {"head": "aux_2", "levels": "P4P6", "patch_capacity": (3, 5)}


@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_detect(asag: Command, workspace: Workspace, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    model = getattr(workspace, kind)
    done = asag(
        "detect", workspace.images[0], workspace.data / "train2017", "--model", model, "-o", output,
        "--batch-size", "2", "--score-threshold", "0", "--threads", "1",
    )  # fmt: skip
    assert (done.code, done.error) == (0, "")
    detections = json.loads((output / "detections.json").read_text())
    images = json.loads((output / "images.json").read_text())["images"]
    assert len(images) == 3
    assert len(detections) > 30
    assert f"{len(detections)} detections in 3 images" in " ".join(done.output.split())
    assert {record["image_id"] for record in detections} == {1, 2, 3}
    for record in images:
        with Image.open(output / record["picture"]) as picture:
            assert picture.size == (record["width"], record["height"])


def test_threshold_of_detect(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    for threshold in ("0.05", "0.15", "1"):
        output = tmp_path / threshold
        options = ("--model", workspace.model, "-o", output, "--score-threshold", threshold)
        assert asag("detect", workspace.images[0], *options).code == 0
    counts = []
    for threshold in ("0.05", "0.15", "1"):
        records = json.loads((tmp_path / threshold / "detections.json").read_text())
        assert all(record["score"] >= float(threshold) for record in records)
        counts.append(len(records))
    assert counts[0] > counts[1] > counts[2] == 0


def test_bad_images_do_not_stop_the_rest(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    files = (tmp_path / "missing.jpg", text, workspace.images[0])
    done = asag("detect", *files, "--model", workspace.model, "-o", tmp_path / "out", "--score-threshold", "0")
    assert done.code == 2
    missing, damaged = done.error.splitlines()
    assert missing.startswith("asag: ")
    assert "missing.jpg" in missing
    assert damaged.startswith("asag: ")
    assert "text.jpg" in damaged
    content = json.loads((tmp_path / "out" / "images.json").read_text())
    assert [Path(record["file_name"]).name for record in content["images"]] == [workspace.images[0].name]
    assert len(content["errors"]) == 2


def test_detecting_with_an_exported_file_imports_no_torch(workspace: Workspace, tmp_path: Path) -> None:
    code = """
import sys
from asag.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as ending:
    assert ending.code == 0, ending.code
print("imported:", [name for name in ("torch", "torchvision", "onnx", "onnxscript") if name in sys.modules])
"""
    arguments = ["detect", str(workspace.images[0]), "--model", str(workspace.model), "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert (tmp_path / "out" / "detections.json").is_file()


@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_evaluate(asag: Command, workspace: Workspace, tmp_path: Path, kind: str) -> None:
    numbers = tmp_path / "numbers.json"
    options = ("--data", workspace.data, "--json", numbers, "--threads", "1", "--images", "3")
    done = asag("evaluate", getattr(workspace, kind), *options)
    assert (done.code, done.error) == (0, "")
    content = json.loads(numbers.read_text())
    assert content["images"] == 3
    assert 0 <= content["ap"] <= content["ap50"] <= 1
    assert f"{content['ap']:.3f}" in done.output
    assert "on 3 images" in done.output


def test_parity(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    numbers, page = tmp_path / "parity.json", tmp_path / "parity.html"
    options = ("--data", workspace.data, "--check", "--json", numbers, "--report", page, "--threads", "1")
    done = asag("parity", workspace.checkpoint, workspace.model, *options)
    assert (done.code, done.error) == (0, "")
    rows = json.loads(numbers.read_text())["rows"]
    assert [row["backend"] for row in rows] == ["pytorch", "onnxruntime-cpu"]
    agreement = rows[1]["agreement"]
    assert agreement["images_within"] == agreement["images"] == 4
    assert agreement["unmatched"] == 0
    assert agreement["matched"] > 50
    assert "onnxruntime-cpu" in done.output
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")


def test_parity_check_fails_for_another_model(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    """Weights that moved a little: the table says so, and only --check makes it an exit code."""
    from asag.checkpoint import load_detector
    from tests.builders import write_checkpoint

    detector, info = load_detector(workspace.checkpoint)
    detector.heads["main"].branches.class_logits.bias.data += 0.01
    moved = write_checkpoint(tmp_path / "moved.safetensors", detector, info)
    options = ("--data", workspace.data, "--images", "1")
    assert asag("parity", workspace.checkpoint, moved, *options).code == 0
    assert asag("parity", workspace.checkpoint, moved, *options, "--check").code == 1
    assert asag("parity", workspace.checkpoint, workspace.checkpoint, *options, "--check").code == 0


def test_bench(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    numbers = tmp_path / "bench.json"
    options = ("--images", workspace.data / "val2017", "--rounds", "3", "--warmup", "1", "--threads", "1")
    done = asag("bench", workspace.checkpoint, workspace.model, *options, "--json", numbers)
    assert (done.code, done.error) == (0, "")
    rows = json.loads(numbers.read_text())["latencies"]
    assert [row["backend"] for row in rows] == ["pytorch", "onnxruntime-cpu"]
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in rows)
    assert "onnxruntime-cpu" in done.output


@pytest.fixture(scope="module")
def engine(asag: Command, workspace: Workspace) -> Path:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    path = workspace.folder / "model.engine"
    done = asag("build", workspace.model, "-o", path, "--batch", "1:3")
    assert (done.code, done.error) == (0, "")
    assert "batch 1 to 3 (tuned for 1, 3)" in " ".join(done.output.split())
    return path


def test_build(engine: Path, workspace: Workspace) -> None:
    manifest = json.loads(Path(f"{engine}.json").read_text())
    assert manifest["profiles"] == [[1, 1, 1], [2, 3, 3]]
    assert manifest["onnx_name"] == workspace.model.name
    assert ModelMetadata.from_properties(manifest["metadata"]).preset == "asag-a-tiny"


def test_an_engine_without_its_gpu_is_a_row_with_the_reason(
    asag: Command, workspace: Workspace, engine: Path, tmp_path: Path
) -> None:
    numbers = tmp_path / "parity.json"
    arguments = ("parity", workspace.checkpoint, workspace.model, engine, "--data", workspace.data, "--images", "1")
    done = asag(*arguments, "--json", numbers)
    row = json.loads(numbers.read_text())["rows"][2]
    if row["reason"] is None:
        pytest.skip("the engine runs on this machine")
    assert done.code == 0
    assert "not run" in done.output
    assert "GPU" in row["reason"]
    assert row["result"] is None
    assert asag(*arguments, "--check").code == 1, "a candidate that did not run is not proven"
    alone = asag("detect", workspace.images[0], "--model", engine, "-o", tmp_path / "out")
    assert alone.code == 2
    assert "GPU" in alone.error
    assert len(alone.error.splitlines()) == 1


def test_synthetic_data(asag: Command, tmp_path: Path) -> None:
    options = ("--train-images", "1", "--val-images", "2", "--image-size", "64")
    for _ in range(2):  # a second time there is nothing to do
        done = asag("data", "synthetic", tmp_path / "data", *options)
        assert (done.code, done.error) == (0, "")
    annotations = json.loads((tmp_path / "data" / "annotations" / "instances_val2017.json").read_text())
    assert len(annotations["images"]) == 2


def test_data_check(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    done = asag("data", "check", workspace.data, "--json", tmp_path / "check.json", "--sheet", tmp_path / "sheet.jpg")
    found = json.loads((tmp_path / "check.json").read_text())
    assert done.code == 0, done.output + done.error
    assert "nothing is wrong" in done.output
    assert found["problems"] == []
    assert [split["name"] for split in found["splits"]] == ["train2017", "val2017"]
    assert Image.open(tmp_path / "sheet.jpg").format == "JPEG"
    copy = tmp_path / "copy"
    shutil.copytree(workspace.data, copy)
    next((copy / "val2017").glob("*.jpg")).unlink()
    done = asag("data", "check", copy)
    assert done.code == 1
    assert "wrong: val2017: 1 pictures missing" in done.output
