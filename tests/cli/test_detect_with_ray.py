"""`asag detect --ray` as a process of its own, which starts and ends a local Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from asag.cli.detect import detect
from tests.runtime.toy_detector import build_toy_model, toy_metadata

pytest.importorskip("ray", reason="needs Ray Data: pip install 'ray[data]'")
pyarrow_parquet = pytest.importorskip("pyarrow.parquet", reason="needs Ray Data: pip install 'ray[data]'")


def processes_with(mark: str) -> list[str]:
    """Command lines of the processes that have ``mark`` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and mark.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue  # it has just ended
    return found


@pytest.mark.slow
def test_starts_ray_and_leaves_no_process(tmp_path: Path) -> None:
    onnx.save(build_toy_model(toy_metadata()), tmp_path / "toy.onnx")
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 70, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number}.png")
    (tmp_path / "images/damaged.png").write_text("no image")
    mark = str(uuid.uuid4())
    arguments = ["detect", "images", "--model", "toy.onnx", "--ray", "--workers", "1", "-o", "found"]
    environment = os.environ | {"ASAG_TEST_MARK": mark, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "asag.cli.main", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "1 images could not be read: see the column error in" in done.stderr
    rows = pyarrow_parquet.read_table(tmp_path / "found").to_pylist()
    assert {Path(row["id"]).name: row["error"] is None for row in rows} == {
        "0.png": True,
        "1.png": True,
        "2.png": True,
        "damaged.png": False,
    }
    deadline = time.monotonic() + 20
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--workers", "2"], "--workers needs --ray"),
        (["--ray-address", "auto"], "--ray-address needs --ray"),
        (["--image-column", "image"], "--image-column needs --ray"),
        (["--id-column", "id"], "--id-column needs --ray"),
        (["--ray", "--stages"], "--ray writes neither pictures for --stages nor the ids of --annotations"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, arguments: list[str], reason: str) -> None:
    result = CliRunner().invoke(detect, [str(tmp_path), "--model", "toy.onnx", *arguments])
    assert result.exit_code == 2
    assert reason in result.output
