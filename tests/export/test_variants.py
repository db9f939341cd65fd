"""What a checkpoint may be deployed with: in PyTorch, in exported files, and in their comparison."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from asag.checkpoint import load_detector
from asag.deploy import DeployedDetector
from asag.export.model import export_onnx
from asag.families.asag.config import HEADS, LEVELS
from asag.runtime import open_session
from asag.runtime.parity.agreement import compare_detections
from asag.runtime.parity.comparison import open_candidate, open_reference
from tests.builders import random_detector, random_picture, small_info, write_checkpoint

PICTURES = [random_picture(1, 160, 192), random_picture(2, 70, 150)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("variants") / "small.safetensors")


def test_heads_differ_and_are_named(checkpoint: Path) -> None:
    sessions = [open_session(checkpoint, choices={"head": head}) for head in HEADS]
    assert [session.metadata.choices["head"] for session in sessions] == list(HEADS)
    scores = [session.detect(PICTURES[:1])[0].scores.tolist() for session in sessions]
    assert len({tuple(values) for values in scores}) == len(HEADS)
    assert open_session(checkpoint, choices={"head": None}).metadata.choices["head"] == random_detector().config.head


def test_levels_say_how_far_the_image_is_explored(checkpoint: Path) -> None:
    explored = {}
    for levels in LEVELS:
        session = open_session(checkpoint, choices={"levels": levels})
        assert session.metadata.choices["levels"] == levels
        values = session.stages(PICTURES[0]).values
        explored[levels] = [name for name in values if name.endswith("_patches/valid") and values[name].any()]
    p4, p3 = "P4_patches/valid", "P3_patches/valid"
    assert explored == {"P3P6": [p4, p3], "P4P6": [p4], "P5P6": []}


def test_choices_that_do_not_exist(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="head is 'last'; choose one of"):
        open_session(checkpoint, choices={"head": "last"})
    with pytest.raises(ValueError, match="levels is 'P2P6'; choose one of"):
        open_session(checkpoint, choices={"levels": "P2P6"})
    with pytest.raises(ValueError, match="ASAG has no choice colour; its choices are head, levels, patch_capacity"):
        open_session(checkpoint, choices={"colour": "red"})


@pytest.mark.slow
@pytest.mark.parametrize(("levels", "head"), [("P4P6", "aux_1"), ("P5P6", "main")])
def test_an_exported_variant_has_the_detections_of_the_same_variant(
    levels: str, head: str, checkpoint: Path, tmp_path: Path
) -> None:
    # Another input size and capacity than the checkpoint's: the reference has to follow them.
    choices = {"head": head, "levels": levels, "patch_capacity": (3, 3)}
    path = tmp_path / "model.onnx"
    report = export_onnx(DeployedDetector(*load_detector(checkpoint, choices), (192, 160)), path)
    assert ("AdaptiveProbing" in report.operations) == (levels != "P5P6")
    weights = {tensor.name for tensor in onnx.load(path).graph.initializer}
    assert {name.split(".")[2] for name in weights if name.startswith("detector.heads.")} == {head}
    candidate = open_candidate(path)
    reference = open_reference(checkpoint, [candidate])
    assert reference.metadata == candidate.metadata
    assert reference.metadata.choices == {"head": head, "levels": levels, "patch_capacity": [3, 3]}
    assert reference.metadata.input_size == (192, 160) != small_info().input.size
    expected, found = reference.detect(PICTURES), candidate.detect(PICTURES, batch_size=2)
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert len(one) > 10
        assert compare_detections(number, one, other, 100).within()
    for option in ({"levels": "P3P6"}, {"head": "aux_0"}, {"patch_capacity": (1, 1)}):
        with pytest.raises(ValueError, match=f"has its {next(iter(option)).replace('_', ' ')} fixed in the file"):
            open_session(path, choices=option)
