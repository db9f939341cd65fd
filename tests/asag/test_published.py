"""Published tensor names: every one has its place, and what does not fit is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from asag.config import HEADS
from torch import Tensor

from asag import DetectorConfig, load_published
from asag.detector import Detector
from asag.published import translate_name
from tests.builders import random_detector, small_config

CONFIGS = {
    "asag_a_r50_100": DetectorConfig(),
    "asag_a_r50_300": DetectorConfig(queries=300),
    "asag_s_r50_100": DetectorConfig("sparse_rcnn"),
}


def published_shapes(goldens: Path, case: str) -> dict[str, list[int]]:
    return json.loads((goldens / f"{case}.shapes.json").read_text())


@pytest.fixture
def small(goldens: Path) -> tuple[Detector, dict[str, Tensor]]:
    """A small detector with a ResNet-50, and its state under the published names."""
    detector = random_detector(small_config(backbone="resnet50"), seed=1)
    ours = detector.state_dict()
    names = [name for name in published_shapes(goldens, "asag_a_r50_100") if not name.endswith("num_batches_tracked")]
    return detector, {name: ours[translate_name(name) or ""].clone() for name in names}


@pytest.mark.parametrize("case", CONFIGS)
def test_every_published_tensor_has_its_place_and_shape(goldens: Path, case: str) -> None:
    """One to one: no two names share a place, and no tensor of the detector is left without a name."""
    with torch.device("meta"):
        ours = {name: list(value.shape) for name, value in Detector(CONFIGS[case]).state_dict().items()}
    translated: dict[str, list[int]] = {}
    for name, shape in published_shapes(goldens, case).items():
        if name.endswith("num_batches_tracked"):
            continue
        target = translate_name(name)
        assert target is not None, name
        assert target not in translated, f"{target} is named twice"
        translated[target] = shape
    assert translated == {name: shape for name, shape in ours.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("backbone.0.body.layer1.0.conv1.weight", "backbone.layer1.0.conv1.weight"),
        ("anchor_generator.compress.0.0.weight", "anchor_generator.compress.P3.0.weight"),
        ("anchor_generator.layernorm.0.weight", "anchor_generator.norm.P5.weight"),
        ("anchor_generator.pos_embedding.2.weight", "anchor_generator.position.P3"),
        ("anchor_generator.proj_patch.layers.2.bias", "anchor_generator.probed_mlp.4.bias"),
        ("rpn.tokens_norm3.weight", "proposals.attention.norm.weight"),
        ("rpn.tokens_proj.layers.1.weight", "proposals.feed_forward.mlp.2.weight"),
        ("decoder.bbox_head.3.iof_tau", "heads.main.attention.tau"),
        ("decoder.decoder_embedding.weight", "head_embedding.weight"),
    ],
)
def test_names_whose_order_is_not_obvious(published: str, ours: str) -> None:
    """Norms and embeddings count from P5, the compressing convolutions from P3 (specification section 3)."""
    assert translate_name(published) == ours


def test_other_names_are_not_translated() -> None:
    for name in (
        "optimizer.state",
        "backbone.body.conv1.weight",
        "rpn.unheard.weight",
        "decoder.bbox_head.4.iof_tau",
        "",
    ):
        assert translate_name(name) is None


def test_round_trip(small: tuple[Detector, dict[str, Tensor]]) -> None:
    source, state = small
    target = random_detector(source.config, seed=2)
    load_published(target, state)
    expected = source.state_dict()
    for name, value in target.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, expected[name]), name


def test_arrays_serve_too(small: tuple[Detector, dict[str, Tensor]]) -> None:
    source, state = small
    target = random_detector(source.config, seed=2)
    load_published(target, {name: value.numpy() for name, value in state.items()})
    assert torch.equal(target.neck.layer_blocks[3][0].weight, source.neck.layer_blocks[3][0].weight)


def refusal(detector: Detector, state: dict[str, Tensor | np.ndarray]) -> str:
    """The message of the error, and that the detector stayed as it was."""
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_published(detector, state)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_named(small: tuple[Detector, dict[str, Tensor]]) -> None:
    source, state = small
    detector = random_detector(source.config, seed=2)
    removed = dict(state)
    del removed["neck.inner_blocks.0.0.bias"]
    assert "missing: neck.inner_blocks.0.0.bias (1)" in refusal(detector, removed)
    added = refusal(detector, {**state, "rpn.unheard": torch.zeros(1)})
    assert "left over: rpn.unheard (1)" in added
    assert "missing" not in added
    misshapen = refusal(detector, {**state, "rpn.iof_tau": torch.zeros(3)})
    assert "of another shape: rpn.iof_tau [3] (expected [4])" in misshapen
    assert "missing" not in misshapen
    together = refusal(detector, {**removed, "rpn.unheard": torch.zeros(1), "rpn.iof_tau": torch.zeros(3)})
    assert together.count("(1)") == 3


def test_a_long_list_is_shortened(small: tuple[Detector, dict[str, Tensor]]) -> None:
    source, state = small
    message = refusal(source, {name: value for name, value in state.items() if not name.startswith("neck.")})
    assert re.search(r"missing: neck\.\S+(, neck\.\S+){4} \.\.\. \(16\)", message)


def test_the_other_decoder_does_not_fit(goldens: Path, small: tuple[Detector, dict[str, Tensor]]) -> None:
    source, state = small
    other = random_detector(small_config(backbone="resnet50", decoder="sparse_rcnn"))
    message = refusal(other, state)
    assert "missing" in message
    assert "left over" in message
    assert set(source.heads) == set(HEADS)
