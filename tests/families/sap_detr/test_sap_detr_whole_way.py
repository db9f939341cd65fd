"""SAP-DETR's presets from training to an engine: the tiny one by the commands, the published ones as files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from asag.checkpoint import CheckpointInfo
from asag.cli.main import main
from asag.datasets import DATASETS
from asag.deploy import DeployedDetector
from asag.export.model import export_onnx
from asag.families import find_preset
from asag.family import InputSpec
from asag.runtime import open_session
from tests.builders import random_picture, uint8_batch
from tests.families.sap_detr.small_detector import random_detector


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
    train = ["train", "--preset", "sap-detr-tiny", "--data", data, "-o", run, "--steps", 2, "--batch-size", 2]
    assert asag(*train, "--set", "training_shorter_sides=[160]", "--device", "cpu", "--quiet") == 0
    checkpoint, model, half, int8 = (
        run / "weights.safetensors",
        *(tmp_path / name for name in ("model.onnx", "half.onnx", "int8.onnx")),
    )
    small = ["--input-size", "160x160"]
    assert asag("export", checkpoint, "-o", model, *small) == 0
    assert asag("export", checkpoint, "-o", half, *small, "--precision", "fp16", "--frame", "content") == 0
    report = ["--json", tmp_path / "parity.json", "--stages", "--check"]
    assert asag("parity", checkpoint, model, "--data", data, *report) == 0
    (stages,) = json.loads((tmp_path / "parity.json").read_text())["stages"]
    expected = ["features", "encoder", "start", "decoder 0", "decoder 1", "decoder 2", "head", "detections"]
    assert [stage["stage"] for stage in stages["stages"]] == expected
    assert stages["first"] is None

    assert asag("detect", data / "val2017", "--model", half, "--stages", "-o", tmp_path / "pictures") == 0
    assert len(list((tmp_path / "pictures").glob("*-stages.jpg"))) == 3
    assert asag("quantize", model, "-o", int8, "--calibration", data / "val2017") == 0
    assert len(open_session(int8).detect([random_picture(1, 120, 150)])[0]) == 300

    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    assert asag("build", half, "-o", tmp_path / "model.engine", "--batch", "1:3") == 0
    assert asag("inspect", tmp_path / "model.engine") == 0
    assert "sap-detr-tiny" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sap-detr-r50", "sap-detr-dc5-r101"])
def test_onnx_runtime_has_the_detections_of_pytorch(name: str, tmp_path: Path) -> None:
    """With all widths and two layers each of encoder and decoder, which are alike."""
    preset = dataclasses.replace(find_preset(name), input=InputSpec(160, 192, (160, 192)))
    size = dataclasses.replace(preset.config.size, encoder_layers=1, decoder_layers=2)
    detector = random_detector(dataclasses.replace(preset.config, size=size))
    model = DeployedDetector(detector, CheckpointInfo.of(preset, DATASETS[preset.dataset])).eval()
    export_onnx(model, tmp_path / "model.onnx")
    images, sizes = uint8_batch([random_picture(seed, 100 + 20 * seed, 150) for seed in range(3)], 160, 192)
    with torch.no_grad():
        boxes, scores, labels, _ = (value.numpy() for value in model(images, sizes))
    found = open_session(tmp_path / "model.onnx").run({"images": images.numpy(), "sizes": sizes.numpy()})
    np.testing.assert_allclose(found["scores"], scores, rtol=0, atol=1e-5)
    gaps = -np.diff(scores, axis=1, prepend=1.0, append=-1.0)
    alone = np.minimum(gaps[:, :-1], gaps[:, 1:]) > 1e-5  # others may change places
    assert alone.sum() > 300
    np.testing.assert_array_equal(found["labels"][alone], labels[alone])
    np.testing.assert_allclose(found["boxes"][alone], boxes[alone], rtol=0, atol=1e-4)
