"""The backbone against torchvision's, and what folding and training do to its norms."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from asag.parts.backbones.resnet import ResNet

STAGES = ("layer1", "layer2", "layer3", "layer4")


def with_random_norms(model: nn.Module) -> nn.Module:
    """Norms that change their input: statistics, scale and bias all differ from their starting values."""
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
            # Small, or the sums along 33 shortcuts would drown the comparison in rounding.
            norm.weight.data.uniform_(0.2, 0.6, generator=generator)
            norm.bias.data.normal_(0, 0.2, generator=generator)
    return model.eval()


def relative_difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101"])
@torch.no_grad()
def test_equals_torchvision(name: str) -> None:
    torch.manual_seed(0)
    reference = with_random_norms(torchvision.models.get_model(name, weights=None))
    ours = ResNet(name).eval()
    missing, left_over = ours.load_state_dict(reference.state_dict(), strict=False)
    assert missing == []
    assert left_over == ["fc.weight", "fc.bias"]
    images = torch.randn(1, 3, 75, 98)
    expected = create_feature_extractor(reference, list(STAGES))(images)
    found = ours(images)
    assert [feature.shape[1] for feature in found] == ours.channels
    for stage, feature in zip(STAGES, found, strict=True):
        assert torch.equal(feature, expected[stage]), stage


@torch.no_grad()
def test_a_dilated_last_stage_equals_torchvision_and_folds() -> None:
    torch.manual_seed(0)
    dilated = [False, False, True]
    reference = with_random_norms(torchvision.models.resnet50(weights=None, replace_stride_with_dilation=dilated))
    ours = ResNet("resnet50", dilation=True).eval()
    ours.load_state_dict(reference.state_dict(), strict=False)
    images = torch.randn(1, 3, 75, 98)
    expected = create_feature_extractor(reference, list(STAGES))(images)["layer4"]
    assert expected.shape[-2:] == (5, 7)
    assert torch.equal(ours(images)[-1], expected)
    ours.fold()
    assert relative_difference(ours(images)[-1], expected) < 1e-4


@torch.no_grad()
def test_dilated_blocks_of_two_convolutions_keep_the_shape() -> None:
    backbone = ResNet("resnet18", width=8, dilation=True).eval()
    assert [map_.shape[-1] for map_ in backbone(torch.randn(1, 3, 64, 64))] == [16, 8, 4, 4]
    assert [block.conv2.dilation for block in backbone.get_submodule("layer4")] == [(1, 1), (2, 2)]


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet50"])
@torch.no_grad()
def test_folding_the_norms_changes_nothing(name: str) -> None:
    torch.manual_seed(2)
    backbone = with_random_norms(ResNet(name, width=16))
    folded = copy.deepcopy(backbone)
    folded.fold()
    assert not list(folded.norms()), "a norm was left"
    images = torch.randn(2, 3, 64, 96)
    for found, expected in zip(folded(images), backbone(images), strict=True):
        assert relative_difference(found, expected) < 1e-4
    assert list(backbone.norms()), "the original must keep its norms"


def test_strides_and_widths() -> None:
    backbone = ResNet("resnet10", width=8).eval()
    assert backbone.channels == [8, 16, 32, 64]
    with torch.no_grad():
        shapes = [tuple(feature.shape) for feature in backbone(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(1, 8, 16, 24), (1, 16, 8, 12), (1, 32, 4, 6), (1, 64, 2, 3)]


@pytest.mark.parametrize("learn", [False, True])
def test_statistics_while_training(learn: bool) -> None:
    """Norms keep their statistics in training mode (ASAG's README, section 2) unless they are to learn them."""
    torch.manual_seed(3)
    backbone = ResNet("resnet10", width=8, train_statistics=learn)
    outer = nn.Sequential(backbone).train()
    assert backbone.training
    assert all(norm.training == learn for norm in backbone.norms())
    before = [norm.running_mean.clone() for norm in backbone.norms()]
    sum(feature.mean() for feature in outer(torch.randn(2, 3, 32, 32) * 3 + 1)).backward()
    moved = [not torch.equal(old, norm.running_mean) for old, norm in zip(before, backbone.norms(), strict=True)]
    assert all(moved) if learn else not any(moved)
    assert all(norm.weight.grad is not None for norm in backbone.norms()), "scale and bias train either way"
    outer.eval()
    assert not any(norm.training for norm in backbone.norms())


def test_freezing_the_first_stages() -> None:
    backbone = ResNet("resnet10", width=8)
    backbone.freeze()
    frozen = {name.split(".")[0] for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    trained = {name.split(".")[0] for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    assert trained == {"layer2", "layer3", "layer4"}
