"""Published tensor names of AdaMixer: every one has its place, and the configuration is read off the tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asag import load_published
from asag.families.adamixer.config import AdaMixerConfig
from asag.families.adamixer.detector import AdaMixerDetector
from asag.families.adamixer.presets import PRESETS
from asag.families.adamixer.published import PublishedAdaMixer, translate_name
from asag.published import convert_published, identify
from tests.families.adamixer.golden_cases import published_shapes
from tests.families.adamixer.small_detector import random_detector, small_config
from tests.golden_files import module

OPTIONS = [
    {"backbone": "resnet50", "queries": 100, "stages": 6},
    {"backbone": "resnet101", "queries": 300, "stages": 7},
    {"backbone": "resnet50", "queries": 300, "stages": 6},
    {"backbone": "resnet50", "queries": 7, "stages": 2},
]


def config_of(options: dict[str, object]) -> AdaMixerConfig:
    return AdaMixerConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_published_tensor_has_its_place_and_shape(goldens: Path, options: dict[str, object]) -> None:
    with torch.device("meta"):
        ours = {name: list(value.shape) for name, value in AdaMixerDetector(config_of(options)).state_dict().items()}
    translated: dict[str, list[int]] = {}
    for name, shape in published_shapes(options).items():
        target = translate_name(name)
        assert target is not None, name
        assert target not in translated, f"{target} is named twice"
        translated[target] = shape
    missing = {name for name in ours if name not in translated}
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert translated == {name: shape for name, shape in ours.items() if name not in missing}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_configuration_is_read_off_the_tensors(goldens: Path, options: dict[str, object]) -> None:
    state = {name: torch.empty(shape, device="meta") for name, shape in published_shapes(options).items()}
    family, config = identify(state)
    assert family.name == "adamixer"
    assert config == config_of(options)


def test_other_names_are_not_translated() -> None:
    for name in (
        "optimizer.state",
        "neck.lateral_convs.0.bn.weight",
        "roi_head.bbox_head.0.unheard",
        "mask_head.a",
        "",
    ):
        assert translate_name(name) is None


def test_what_is_no_known_variant_is_said() -> None:
    known = PublishedAdaMixer()
    assert known.identify({"rpn_head.init_content_features.weight": torch.zeros(1, 1)}, {}) is None
    state = {"rpn_head.init_content_features.weight": torch.zeros(3, 4), "roi_head.bbox_head.0.iof_tau": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"without roi_head\.bbox_head\.0\.fc_cls\.weight; is the file whole"):
        known.identify(state, {})
    state["roi_head.bbox_head.0.fc_cls.weight"] = torch.zeros(80, 4)
    with pytest.raises(ValueError, match="no published AdaMixer has 0 blocks in layer3"):
        known.identify(state, {})


@pytest.fixture
def small(goldens: Path) -> tuple[AdaMixerDetector, dict[str, Tensor]]:
    """A small detector with a ResNet-50, and its state under the published names."""
    detector = random_detector(small_config(backbone="resnet50"), seed=1)
    options = {"backbone": "resnet50", "queries": 12, "stages": detector.config.stages}
    ours = detector.state_dict()
    names = [name for name in published_shapes(options) if not name.endswith("num_batches_tracked")]
    return detector, {name: ours[translate_name(name) or ""].clone() for name in names}


def test_round_trip(small: tuple[AdaMixerDetector, dict[str, Tensor]]) -> None:
    source, state = small
    target = random_detector(source.config, seed=2)
    load_published(target, state)
    expected = source.state_dict()
    for name, value in target.state_dict().items():
        assert torch.equal(value, expected[name]) or name.endswith("num_batches_tracked"), name


def test_what_does_not_fit_is_named(small: tuple[AdaMixerDetector, dict[str, Tensor]]) -> None:
    detector, state = small
    removed = {name: value for name, value in state.items() if name != "neck.gn_out.bias"}
    with pytest.raises(ValueError, match=r"missing: neck\.norm\.bias \(1\)"):
        load_published(detector, removed)
    with pytest.raises(ValueError, match=r"left over: roi_head\.bbox_head\.3\.iof_tau \(1\)"):
        load_published(detector, {**state, "roi_head.bbox_head.3.iof_tau": torch.zeros(4)})
    shaped = {**state, "rpn_head.init_proposal_bboxes.weight": torch.zeros(5, 4)}
    with pytest.raises(ValueError, match=r"init_proposal_bboxes\.weight \[5, 4\] \(expected \[12, 4\]\)"):
        load_published(detector, shaped)


@pytest.mark.slow
def test_a_file_of_the_authors_becomes_a_checkpoint(goldens: Path, tmp_path: Path) -> None:
    """As MMDetection writes it: `meta` and an optimizer beside the tensors."""
    options = {"backbone": "resnet50", "queries": 100, "stages": 6}
    arrays = module(goldens / "sqr").golden_state_dict(published_shapes(options))
    state = {name: torch.from_numpy(value) for name, value in arrays.items()}
    torch.save({"meta": {"epoch": 12}, "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "file.pth")
    converted = convert_published(tmp_path / "file.pth", tmp_path / "ours.safetensors")
    assert converted.config == PRESETS["adamixer-r50-1x-100"].config
    assert converted.alternatives == ("adamixer-r50-1x-100", "sqr-adamixer-r50-1x-100")


def test_shapes_files_are_the_published_detectors_sizes(goldens: Path) -> None:
    """Parameters of the presets in millions, as the results' tables give them."""
    for preset, millions in (("sqr-adamixer-r50-1x-100", 134.8), ("sqr-adamixer-r101-3x-300", 172.2)):
        with torch.device("meta"):
            detector = AdaMixerDetector(PRESETS[preset].config)
        count = sum(parameter.numel() for parameter in detector.parameters())
        assert round(count / 1e6, 1) == millions
    assert len(json.loads((goldens / "sqr" / "adamixer_r50_100.shapes.json").read_text())) > 300
