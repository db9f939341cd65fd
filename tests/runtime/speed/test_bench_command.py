"""`asag bench --against`: what a checkpoint runs on here, and why not on the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from asag.cli.bench import bench
from tests.builders import random_picture
from tests.exports import small_export


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    Image.fromarray(random_picture(1, 120, 160)).save(folder / "picture.png")
    return small_export().checkpoint(folder / "small.safetensors")


def run(checkpoint: Path, *options: str) -> Result:
    arguments = [
        str(checkpoint),
        "--images",
        str(checkpoint.with_name("picture.png")),
        "--rounds",
        "2",
        "--warmup",
        "1",
    ]
    return CliRunner().invoke(bench, [*arguments, "--threads", "1", *options])


@pytest.fixture(scope="module")
def measured(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, Any]]:
    """What one run with everything printed and wrote."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    numbers = tmp_path_factory.mktemp("numbers") / "bench.json"
    backends = "onnxruntime-cpu,pytorch,onnxruntime-cuda"
    with pytest.MonkeyPatch.context() as patch:
        small_export().instead_of_exporting(patch)
        done = run(checkpoint, "--against", backends, "--batch-sizes", "1,2", "--limit", "--json", str(numbers))
    assert done.exit_code == 0, done.output
    return done, json.loads(numbers.read_text())


@pytest.mark.slow
def test_a_checkpoint_against_its_export(checkpoint: Path, measured: tuple[Result, dict[str, Any]]) -> None:
    _, found = measured
    assert [item["backend"] for item in found["latencies"]] == ["onnxruntime-cpu", "pytorch"]
    assert [item["name"] for item in found["latencies"]] == ["small.onnx", "small.safetensors"]
    assert [item["backend"] for item in found["unavailable"]] == ["onnxruntime-cuda"]
    assert "has no CUDA" in found["unavailable"][0]["reason"]
    assert [item["batch_size"] for item in found["throughput"]] == [1, 1, 2, 2]
    assert [path.name for path in checkpoint.parent.iterdir()] != [], "nothing was written beside the checkpoint"
    assert not list(checkpoint.parent.glob("*.onnx"))


@pytest.mark.slow
def test_stages_and_limits(measured: tuple[Result, dict[str, Any]]) -> None:
    done, found = measured
    assert [row["backend"] for row in found["stage_times"]] == ["onnxruntime-cpu", "pytorch"]
    assert [row["reason"] for row in found["stage_times"]] == [None, None]
    network = ["features", "anchors", "proposals", "head", "detections"]
    for times, limits in zip(found["stage_times"], found["limits"], strict=True):
        assert set(network) <= set(times["p50_ms"])
        assert [stage["stage"] for stage in limits["stages"]] == network
        assert all(stage["fraction"] > 0 for stage in limits["stages"])
    first, second = ([(s["operations"], s["bytes"]) for s in limits["stages"]] for limits in found["limits"])
    assert first == second, "a checkpoint has the work of its export"
    assert "matrix products" in done.output
    assert "Time per stage" in done.output


@pytest.mark.slow
def test_a_compiled_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    numbers = tmp_path / "bench.json"
    done = run(checkpoint, "--against", "pytorch,torch-compile", "--json", str(numbers))
    assert done.exit_code == 0, done.output
    assert [item["backend"] for item in json.loads(numbers.read_text())["latencies"]] == ["pytorch", "torch-compile"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", "tensorflow"), "unknown 'tensorflow'; choose of pytorch"),
        (("--batch-sizes", "1,0"), "no list of batch sizes"),
        (("--batch-sizes", "one"), "no list of batch sizes"),
    ],
)
def test_wrong_options(checkpoint: Path, options: tuple[str, ...], message: str) -> None:
    done = run(checkpoint, *options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_only_a_checkpoint_has_other_backends(toy_onnx: Path, checkpoint: Path) -> None:
    options = ["--images", str(checkpoint.with_name("picture.png")), "--against", "pytorch"]
    done = CliRunner().invoke(bench, [str(toy_onnx), *options])
    assert isinstance(done.exception, ValueError)
    assert "is no checkpoint" in str(done.exception)
