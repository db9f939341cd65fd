"""AdaMixer's presets from training to an engine: the tiny one by the commands, the published ones as files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from asag.checkpoint import CheckpointInfo
from asag.cli.main import main
from asag.datasets import DATASETS
from asag.deploy import DeployedDetector
from asag.export.model import export_onnx
from asag.families import find_preset
from asag.families.adamixer import ADAMIXER
from asag.family import InputSpec
from asag.runtime import open_session
from asag.runtime.backends.pytorch_session import PyTorchSession
from asag.runtime.parity.agreement import compare_detections
from tests.builders import random_picture
from tests.families.adamixer.small_detector import random_detector, small_config


def asag(*arguments: object) -> int:
    """The exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.slow
def test_the_tiny_preset_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    assert asag("data", "synthetic", data, "--train-images", 4, "--val-images", 3, "--image-size", 160) == 0
    train = ["train", "--preset", "adamixer-tiny", "--data", data, "-o", run, "--steps", 2, "--batch-size", 2]
    settings = ["--set", "recollection=one_by_one", "--set", "training_shorter_sides=[160]"]
    assert asag(*train, *settings, "--device", "cpu", "--quiet") == 0
    checkpoint, model, half, int8 = (
        run / "weights.safetensors",
        *(tmp_path / name for name in ("model.onnx", "half.onnx", "int8.onnx")),
    )
    assert asag("export", checkpoint, "-o", model, "--input-size", "160x160") == 0
    assert asag("export", checkpoint, "-o", half, "--input-size", "160x160", "--precision", "fp16") == 0
    report = ["--json", tmp_path / "parity.json", "--report", tmp_path / "parity.html", "--stages", "--check"]
    assert asag("parity", checkpoint, model, "--data", data, *report) == 0
    (stages,) = json.loads((tmp_path / "parity.json").read_text())["stages"]
    expected = ["features", "start", "decoder 0", "decoder 1", "decoder 2", "head", "detections"]
    assert [stage["stage"] for stage in stages["stages"]] == expected
    assert stages["first"] is None
    assert "decoder 2: 40" in (tmp_path / "parity.html").read_text()

    assert asag("detect", data / "val2017", "--model", half, "--stages", "-o", tmp_path / "pictures") == 0
    assert len(list((tmp_path / "pictures").glob("*-stages.jpg"))) == 3
    measured = ["--rounds", 1, "--warmup", 0, "--stages", "--json", tmp_path / "bench.json"]
    assert asag("bench", model, "--images", data / "val2017", *measured) == 0
    (times,) = json.loads((tmp_path / "bench.json").read_text())["stage_times"]
    assert {"features", "start", "decoder", "head", "detections"} <= set(times["p50_ms"])
    assert asag("quantize", model, "-o", int8, "--calibration", data / "val2017") == 0
    assert len(open_session(int8).detect([random_picture(1, 120, 150)])[0]) == 40

    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    assert asag("build", model, "-o", tmp_path / "model.engine", "--precision", "bf16", "--batch", "1:3") == 0
    assert asag("inspect", tmp_path / "model.engine") == 0
    assert "adamixer-tiny" in capsys.readouterr().out
    assert asag("serve-repository", model, "-o", tmp_path / "served") == 0
    assert asag("serve-repository", tmp_path / "model.engine", "-o", tmp_path / "served", "--name", "engine") == 0
    assert (tmp_path / "served" / "adamixer-tiny" / "config.pbtxt").is_file()


CASES: dict[str, dict[str, Any]] = {
    "sqr-adamixer-r50-1x-100": {"stages": 2},
    "sqr-adamixer-r101-3x-300": {"stages": 2, "size": small_config().size},
}
"""Presets with two of their stages, which are alike; one with its published widths, one with thin layers."""


def test_the_cases_cover_every_preset() -> None:
    for what in ("backbone", "queries"):
        published = {getattr(preset.config, what) for preset in ADAMIXER.presets.values() if preset.published}
        assert {getattr(ADAMIXER.presets[name].config, what) for name in CASES} == published


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_onnx_runtime_has_the_detections_of_pytorch(name: str, tmp_path: Path) -> None:
    preset = dataclasses.replace(find_preset(name), input=InputSpec(160, 192, (160, 192)))
    detector = random_detector(dataclasses.replace(preset.config, **CASES[name]))
    model = DeployedDetector(detector, CheckpointInfo.of(preset, DATASETS[preset.dataset]))
    export_onnx(model, tmp_path / "model.onnx")
    pictures = [random_picture(seed, 100 + 20 * seed, 150) for seed in range(3)]
    with open_session(tmp_path / "model.onnx") as session:
        found = session.detect(pictures, batch_size=3)
    for number, expected in enumerate(PyTorchSession(model, "reference").detect(pictures)):
        assert len(expected) == preset.config.queries
        agreement = compare_detections(number, expected, found[number], preset.config.queries)
        assert agreement.within(), agreement
