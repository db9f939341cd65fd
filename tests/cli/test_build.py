"""`asag build`: precisions, what a killed build leaves, and its own bad input."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest

from asag.export.conversion import convert_file
from asag.runtime.engines.manifest import read_manifest

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Workspace

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def half_model(asag: Command, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "half.onnx"
    assert asag("export", workspace.checkpoint, "-o", path, "--precision", "fp16").code == 0
    return path


@pytest.mark.parametrize(("precision", "element"), [("fp16", "half"), ("bf16", "bf16")])
def test_another_precision(asag: Command, workspace: Workspace, tmp_path: Path, precision: str, element: str) -> None:
    engine = tmp_path / "model.engine"
    done = asag("build", workspace.model, "-o", engine, "--batch", 1, "--precision", precision, "--tf32")
    assert (done.code, done.error) == (0, "")
    assert f", {precision}, TF32, batch 1 to 1" in " ".join(done.output.split())
    manifest = read_manifest(engine)
    assert (manifest.precision, manifest.metadata.precision) == (precision, precision)
    assert (manifest.onnx_name, manifest.tf32) == (workspace.model.name, True)
    assert manifest.onnx_sha256 == hashlib.sha256(workspace.model.read_bytes()).hexdigest()
    assert manifest.layer_types[element] > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.engine", "model.engine.json"]


def test_int8(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    images, engine = workspace.data / "val2017", tmp_path / "model.engine"
    done = asag("build", workspace.model, "-o", engine, "--batch", 1, "--precision", "int8", "--calibration", images)
    assert (done.code, done.error) == (0, "")
    assert "convolutions of backbone and neck in int8, calibrated on 4 images" in " ".join(done.output.split())
    manifest = read_manifest(engine)
    assert manifest.precision == "int8"
    assert manifest.layers["quantize"] > 3
    assert manifest.layer_types["int8"] > 3
    assert manifest.onnx_sha256 == hashlib.sha256(workspace.model.read_bytes()).hexdigest()


def test_conversion_gives_what_the_export_gives(workspace: Workspace, half_model: Path, tmp_path: Path) -> None:
    convert_file(workspace.model, tmp_path / "converted.onnx", "fp16")
    converted, exported = onnx.load(tmp_path / "converted.onnx"), onnx.load(half_model)
    assert converted.graph == exported.graph
    assert {(item.key, item.value) for item in converted.metadata_props} == {
        (item.key, item.value) for item in exported.metadata_props
    }


def test_a_file_in_the_precision_is_built_as_it_is(asag: Command, half_model: Path, tmp_path: Path) -> None:
    done = asag("build", half_model, "-o", tmp_path / "model.engine", "--batch", 1, "--precision", "fp16")
    assert (done.code, done.error) == (0, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--precision fp32", "half.onnx is in fp16; only a file in fp32 becomes another precision"),
        ("--precision int8 --calibration {images}", "half.onnx is in fp16; only a file in fp32"),
        ("--max-ap-drop 0.1", "--max-ap-drop is for --precision int8"),
        ("--ops plugins", "TensorRT-RTX has no plugins"),
        ("--timing-cache {folder}/timings", "TensorRT-RTX keeps no timing cache"),
        ("--target sm_90", "unknown GPU architecture 'sm_90'"),
        ("--workspace 0", "0 is not in the range"),
        ("--backend tensorrt", "TensorRT "),
    ],
)
def test_bad_input(
    asag: Command, workspace: Workspace, half_model: Path, tmp_path: Path, options: str, message: str
) -> None:
    words = options.format(images=workspace.data / "val2017", folder=tmp_path).split()
    done = asag("build", half_model, "-o", tmp_path / "model.engine", *words)
    if "tensorrt" in words and done.code == 0:
        pytest.skip("TensorRT and a GPU are here")
    assert done.code == 2
    assert done.error.startswith("asag: ")
    assert len(done.error.splitlines()) == 1
    assert message in done.error
    assert list(tmp_path.iterdir()) == []


def test_int8_needs_images(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    done = asag("build", workspace.model, "-o", tmp_path / "model.engine", "--precision", "int8")
    assert (done.code, done.output) == (2, "")
    assert "--precision int8 needs --calibration FOLDER" in done.error
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_no_engine(workspace: Workspace, tmp_path: Path) -> None:
    """Killed while the builder works: it says so in a file that the process reports its progress to."""
    progress = tmp_path / "progress"
    script = f"""
import sys
from rich.status import Status
genuine = Status.update
def update(self, text):
    with open({str(progress)!r}, "a") as file:
        print(text, file=file)
    genuine(self, text)
Status.update = update
from asag.cli.main import main
main(sys.argv[1:])
"""
    folder = tmp_path / "engines"
    folder.mkdir()
    words = ["build", workspace.model, "-o", folder / "model.engine", "--batch", "1:2:4:8:16"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, words)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if progress.exists() and "building: Building" in progress.read_text():
                break
            time.sleep(0.02)
        assert process.poll() is None, "the build ended before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert "building: parsing" in progress.read_text()
    assert "building: built" not in progress.read_text()
    assert list(folder.iterdir()) == []
