"""Every preset: exported, run by ONNX Runtime with PyTorch's detections, built by TensorRT-RTX."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from asag.categories import DATASET_CATEGORIES
from asag.config import DetectorConfig
from asag.presets import PRESETS

from asag.checkpoint import CheckpointInfo
from asag.deploy import DeployedDetector
from export.model import export_onnx
from runtime import open_session
from runtime.backends.pytorch_session import PyTorchSession
from runtime.engines.build import BuildOptions, build_engine
from runtime.errors import BackendUnavailableError
from runtime.metadata import ModelMetadata
from runtime.parity.agreement import compare_detections
from tests.builders import random_detector, random_picture

INPUT_SIZE = (256, 320)
"""Small, so that a case takes seconds; the graph is that of any other size."""

LARGEST_R50_FILE = 260e6


def graphs() -> dict[str, DetectorConfig]:
    """One preset for each graph: presets that differ in the head alone have the same operators and shapes."""
    found: dict[DetectorConfig, str] = {}
    for name, preset in PRESETS.items():
        found.setdefault(dataclasses.replace(preset.config, head="main"), name)
    return {name: PRESETS[name].config for name in found.values()}


# The others are the same operators with more layers, or a combination of two that are always run: these six would take
# four minutes on a busy core.
_ALWAYS = ("asag-a-tiny", "asag-a-r50-1x-100", "asag-a-r50-1x-300", "asag-s-r50-3x-100", "asag-s-crowdhuman")
CASES = [pytest.param(name, marks=() if name in _ALWAYS else pytest.mark.slow) for name in graphs()]


def test_every_preset_has_the_graph_of_a_case() -> None:
    covered = [dataclasses.replace(config, head="main") for config in graphs().values()]
    assert all(dataclasses.replace(preset.config, head="main") in covered for preset in PRESETS.values())
    assert {preset.config.decoder for preset in PRESETS.values()} == {"adamixer", "sparse_rcnn"}
    assert set(_ALWAYS) <= set(graphs())


@pytest.fixture(scope="module", params=CASES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, DeployedDetector]]:
    """An exported preset with random weights, and the model it was made of."""
    name = request.param
    categories = DATASET_CATEGORIES[PRESETS[name].config.dataset]
    info = CheckpointInfo(
        name, tuple(categories), tuple(categories.values()), *INPUT_SIZE, INPUT_SIZE, patch_capacity=(8, 16)
    )
    model = DeployedDetector(random_detector(PRESETS[name].config), info)
    path = tmp_path_factory.mktemp(name) / "model.onnx"
    export_onnx(model, path)
    yield path, model
    for file in path.parent.iterdir():  # hundreds of megabytes each
        file.unlink()


def test_onnx_runtime_has_the_detections_of_pytorch(exported: tuple[Path, DeployedDetector]) -> None:
    path, model = exported
    config = model.detector.config
    if config.backbone == "resnet50":
        assert path.stat().st_size <= LARGEST_R50_FILE
    pictures = [random_picture(1, 256, 300), random_picture(2, 90, 120)]
    reference = PyTorchSession(model, "reference")
    with open_session(path) as session:
        assert session.metadata == reference.metadata == ModelMetadata(**model.describe())
        found = session.detect(pictures, batch_size=2)
    for number, (picture, expected) in enumerate(zip(pictures, reference.detect(pictures), strict=True)):
        stages = reference.stages(picture)
        assert all(len(stages.patches[level]) > 1 for level in ("P4", "P3")), "the case explores no patches"
        assert len(expected) > 50
        agreement = compare_detections(
            number, expected, found[number], config.max_detections, suppressed=config.nms_iou is not None
        )
        assert agreement.within(), agreement
        assert found[number].overflow == expected.overflow


def test_tensorrt_rtx_builds_it(exported: tuple[Path, DeployedDetector]) -> None:
    path, model = exported
    try:
        result = build_engine(path, path.with_suffix(".engine"), BuildOptions(batch=(2,)))
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert result.engine_bytes > 0.9 * path.stat().st_size, "the engine holds all weights"
    assert result.manifest.metadata.preset == model.info.preset
