"""The PyTorch session around the real detector; its numbers are tested with the detector."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asag.runtime import open_session
from asag.runtime.parity.agreement import compare_detections
from asag.runtime.postprocessing import OUTPUT_NAMES
from asag.runtime.preprocessing import prepare


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small detector with random weights."""
    import torch

    from asag.checkpoint import CheckpointInfo, save_detector
    from asag.detector import build_detector
    from asag.families import find_preset
    from asag.family import InputSpec

    torch.manual_seed(0)
    preset = find_preset("asag-a-tiny")
    config = dataclasses.replace(preset.config, num_classes=3)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    info = CheckpointInfo("asag-a-tiny", (1, 3, 7), ("a", "b", "c"), InputSpec(96, 96, (96, 96)))
    save_detector(path, build_detector(config), info)
    return path


def test_detections_do_not_depend_on_the_batch(checkpoint: Path) -> None:
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (60 + 9 * number, 90 - 8 * number, 3), np.uint8) for number in range(4)]
    with open_session(checkpoint) as session:
        assert (session.backend, session.precision) == ("pytorch", "fp32")
        assert session.metadata.preset == "asag-a-tiny"
        assert session.metadata.input_size == (96, 96)
        together, alone = session.detect(images, batch_size=4), session.detect(images, batch_size=1)
    for number, (one, other) in enumerate(zip(together, alone, strict=True)):
        assert len(one) > 0
        assert one.image_size == images[number].shape[:2]
        assert set(one.labels.tolist()) <= {1, 3, 7}
        assert compare_detections(number, one, other, session.metadata.max_detections).within()


def test_input_size_is_an_option(checkpoint: Path) -> None:
    session = open_session(checkpoint, input_size=(128, 64), precision="fp32")
    outputs = session.run(prepare([Image.new("RGB", (50, 80))], session.metadata))
    assert session.metadata.input_size == (128, 64)
    assert {name: value.shape[0] for name, value in outputs.items()} == dict.fromkeys(OUTPUT_NAMES, 1)
    with pytest.raises(ValueError, match="multiples of 32"):
        open_session(checkpoint, input_size=(100, 100))


@pytest.mark.gpu
def test_gpu_gives_what_the_cpu_gives(checkpoint: Path) -> None:
    images = [np.random.default_rng(number).integers(0, 256, (80, 90, 3), np.uint8) for number in range(4)]
    expected = open_session(checkpoint).detect(images)
    for number, found in enumerate(open_session(checkpoint, device="cuda").detect(images)):
        assert compare_detections(number, expected[number], found, 100, score_tolerance=1e-3).unmatched_reference == 0


def test_damaged_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0 not a header")
    with pytest.raises(ValueError, match=r"model.safetensors") as caught:
        open_session(path)
    assert "\n" not in str(caught.value)


def test_without_torch_the_remedy_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"anything")
    code = """
import sys
sys.modules["torch"] = None
from asag.runtime import BackendUnavailableError, open_session
try:
    open_session(sys.argv[1])
except BackendUnavailableError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "needs PyTorch" in done.stdout
    assert ".onnx" in done.stdout
