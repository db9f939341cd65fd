"""Presets of ASAG: exported, run by ONNX Runtime with PyTorch's detections, built by TensorRT-RTX."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from asag.checkpoint import CheckpointInfo
from asag.datasets import DATASETS
from asag.deploy import DeployedDetector
from asag.export.model import export_onnx
from asag.families import find_preset
from asag.families.asag import ASAG
from asag.family import InputSpec
from asag.runtime import open_session
from asag.runtime.backends.pytorch_session import PyTorchSession
from asag.runtime.engines.build import BuildOptions, build_engine
from asag.runtime.errors import BackendUnavailableError
from asag.runtime.metadata import ModelMetadata
from asag.runtime.parity.agreement import compare_detections
from tests.builders import random_detector, random_picture, small_config

INPUT_SIZE = (256, 320)
"""Small, so that a case takes seconds; the graph is that of any other size."""

LARGEST_R50_FILE = 260e6

CASES = {
    "asag-a-tiny": True,
    "asag-a-r50-1x-100": False,
    "asag-s-crowdhuman": True,
    "asag-d-r50-3x-300": True,
    "asag-s-r50-3x-100": False,
    "asag-a-r101-3x-300": False,
}
"""Whether a case has its published widths, as each decoder has once; ASAG-A's meet photographs in
tests/end_to_end/test_photographs.py. Thin layers are the same operators, and most of the time lies in the wide ones.
What is left out differs from these in the head, or combines what two of them have.
"""


def test_the_cases_cover_every_preset() -> None:
    # ASAG-D's small one is exported with the family's own tests.
    presets = {name: preset.config for name, preset in ASAG.presets.items() if name != "asag-d-tiny"}
    cases = {name: presets[name] for name in CASES}
    for what in (("decoder", "queries"), ("decoder", "dataset"), ("backbone",)):
        needed = {tuple(getattr(config, name) for name in what) for config in presets.values()}
        assert {tuple(getattr(config, name) for name in what) for config in cases.values()} == needed
    published = {(config.decoder, config.size) for config in presets.values()}
    elsewhere = find_preset("asag-a-r50-1x-100").config
    covered = {(cases[name].decoder, cases[name].size) for name, full in CASES.items() if full}
    assert covered == published - {(elsewhere.decoder, elsewhere.size)}


@pytest.fixture(scope="module", params=CASES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, DeployedDetector]]:
    """An exported preset with random weights, and the model it was made of."""
    preset = find_preset(request.param)
    config = dataclasses.replace(preset.config, patch_capacity=(8, 16))
    if not CASES[preset.name]:
        config = dataclasses.replace(config, size=small_config().size)
    preset = dataclasses.replace(preset, input=InputSpec(*INPUT_SIZE, INPUT_SIZE))
    model = DeployedDetector(random_detector(config), CheckpointInfo.of(preset, DATASETS[preset.dataset]))
    path = tmp_path_factory.mktemp(preset.name) / "model.onnx"
    export_onnx(model, path)
    yield path, model
    for file in path.parent.iterdir():  # hundreds of megabytes each
        file.unlink()


@pytest.mark.slow
def test_onnx_runtime_has_the_detections_of_pytorch(exported: tuple[Path, DeployedDetector]) -> None:
    path, model = exported
    config = model.detector.config
    if CASES[model.info.preset] and config.backbone == "resnet50":
        assert path.stat().st_size <= LARGEST_R50_FILE
    pictures = [random_picture(1, 256, 300), random_picture(2, 90, 120)]
    reference = PyTorchSession(model, "reference")
    with open_session(path) as session:
        assert session.metadata == reference.metadata == ModelMetadata(**model.describe())
        found = session.detect(pictures, batch_size=2)
    for number, (picture, expected) in enumerate(zip(pictures, reference.detect(pictures), strict=True)):
        values = reference.stages(picture).values
        explored = [values[f"{level}_patches/valid"].sum() for level in ("P4", "P3")]
        assert all(count > 1 for count in explored), "the case explores no patches"
        assert len(expected) > 50
        agreement = compare_detections(
            number, expected, found[number], config.max_detections, suppressed=config.nms_iou is not None
        )
        assert agreement.within(), agreement
        assert found[number].overflow == expected.overflow


@pytest.mark.slow
def test_tensorrt_rtx_builds_it(exported: tuple[Path, DeployedDetector]) -> None:
    path, model = exported
    try:
        result = build_engine(path, path.with_suffix(".engine"), BuildOptions(batch=(2,)))
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert result.engine_bytes > 0.9 * weights, "the engine holds all of them"
    assert result.manifest.metadata.preset == model.info.preset
