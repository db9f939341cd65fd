"""Backbone weights under the names that different pretrainings give them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from asag.detector import Detector, build_detector
from asag.families.asag.config import ASAGConfig, ModelSize
from asag.families.deformable.config import DeformableConfig
from asag.families.deformable.config import ModelSize as DeformableSize
from asag.train.initialization import load_backbone


@pytest.fixture
def detector() -> Detector:
    size = ModelSize(8, 16, 8, anchor_hidden=8, feed_forward=8, attention_heads=2, sampling_points=4, mixed_points=4)
    return build_detector(ASAGConfig(backbone="resnet10", queries=50, num_classes=2, size=size))


@pytest.fixture
def weights(detector: Detector) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = detector.backbone.state_dict()
    return {n: torch.rand(v.shape, generator=generator).to(v.dtype) for n, v in state.items()}


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def assert_loaded(detector: Detector, weights: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, weights[name]) for name, value in detector.backbone.state_dict().items())


@pytest.mark.parametrize(
    "prefix", ["", "module.", "backbone.", "encoder.", "body.", "backbone.0.body.", "module.base."]
)
@pytest.mark.parametrize("nesting", [(), ("state_dict",), ("model",)])
def test_prefixes_and_nesting(
    prefix: str, nesting: tuple[str, ...], detector: Detector, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    content: Any = prefixed(prefix, {**weights, "fc.weight": torch.zeros(2, 2), "fc.2.bias": torch.zeros(2)})
    for name in nesting:
        content = {name: content, "epoch": 3, "arch": "resnet", "args": argparse.Namespace(lr=1.0)}
    torch.save(content, tmp_path / "backbone.pth")
    load_backbone(detector, tmp_path / "backbone.pth")
    assert_loaded(detector, weights)


def test_the_trained_encoder_is_taken_not_its_momentum_copy(
    detector: Detector, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    copy = {name: value + 1 for name, value in weights.items()}
    content = prefixed("module.encoder_k.", copy) | prefixed("module.encoder_q.", weights)
    content |= {
        "module.queue": torch.zeros(4, 8),
        "module.queue_ptr": torch.zeros(1),
        "module.neck.conv1.weight": copy["conv1.weight"],
    }
    torch.save({"state_dict": content}, tmp_path / "moco.pth.tar")
    load_backbone(detector, tmp_path / "moco.pth.tar")
    assert_loaded(detector, weights)


def test_parts_by_their_numbers(detector: Detector, weights: dict[str, Tensor], tmp_path: Path) -> None:
    """As SCRL writes a ResNet, with a projector and the momentum copy beside it."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    content = {}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        content[f"encoder.{numbers[part]}.{rest}"] = value
    content["projector.0.weight"] = torch.zeros(2, 2)
    other = {name: value + 1 for name, value in content.items()}
    torch.save({"online_network_state_dict": content, "target_network_state_dict": other}, tmp_path / "scrl.pth")
    load_backbone(detector, tmp_path / "scrl.pth")
    assert_loaded(detector, weights)


def test_a_swin_keeps_the_norms_that_a_classifier_does_not_have(tmp_path: Path) -> None:
    size = DeformableSize(backbone_width=32, channels=16, norm_groups=4, feed_forward=16)
    detector = build_detector(DeformableConfig(backbone="swin-t", queries=5, num_classes=2, size=size))
    ours = detector.backbone.state_dict()
    content = {name: torch.rand_like(value) for name, value in ours.items() if not name.startswith("norm")}
    classifier = {"norm.weight": torch.zeros(256), "head.weight": torch.zeros(2, 256)}
    windows = dict.fromkeys(("attn_mask", "attn.relative_position_index"), torch.zeros(49, 49))
    windows = {f"layers.0.blocks.1.{name}": value for name, value in windows.items()}
    torch.save({"model": content | classifier | windows}, tmp_path / "swin.pth")
    load_backbone(detector, tmp_path / "swin.pth")
    for name, value in detector.backbone.state_dict().items():
        assert torch.equal(value, content.get(name, torch.full_like(value, float(name.endswith("weight"))))), name


def test_several_backbones_are_refused(detector: Detector, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    copy = {name: value.clone() for name, value in weights.items()}
    safetensors.torch.save_file(prefixed("left.", weights) | prefixed("right.", copy), path)
    with pytest.raises(ValueError, match=r"several backbones \(left\., right\.\)"):
        load_backbone(detector, path)


def test_what_does_not_fit_is_named(detector: Detector, weights: dict[str, Tensor], tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in detector.backbone.state_dict().items()}
    path = tmp_path / "backbone.pth"
    changed = {name: value for name, value in weights.items() if name != "layer2.0.conv1.weight"}
    changed |= {"layer5.weight": torch.zeros(1), "conv1.weight": torch.zeros(3, 3)}
    torch.save(prefixed("encoder.", changed), path)
    with pytest.raises(ValueError, match="does not hold the weights of resnet10") as caught:
        load_backbone(detector, path)
    message = str(caught.value)
    assert "1 missing (layer2.0.conv1.weight)" in message
    assert "1 left over (layer5.weight)" in message
    assert "1 of another shape (conv1.weight)" in message
    assert "'encoder.'" in message
    assert_loaded(detector, before)


def test_running_counts_may_be_missing(detector: Detector, weights: dict[str, Tensor], tmp_path: Path) -> None:
    kept = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "backbone.pth")
    load_backbone(detector, tmp_path / "backbone.pth")
    assert torch.equal(detector.backbone.conv1.weight, weights["conv1.weight"])


class Command:
    """What a file must not be able to do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_nothing_in_the_file_is_run(detector: Detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"conv1.weight": torch.zeros(1), "evil": Command()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        load_backbone(detector, tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""
