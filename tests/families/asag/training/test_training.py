"""ASAG's training as the loop uses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from asag.families.asag.config import DECODERS, LEVELS
from asag.families.asag.training.settings import ASAGSettings
from asag.families.asag.training.training import ASAGTraining
from asag.train.config import TrainConfig
from asag.training.protocol import Batch, Step
from asag.training.randomness import image_generators
from benchmarks.training import random_pieces
from tests.builders import random_detector, small_config

FROZEN = {"train_batch_statistics": False}


def batch_of(images: int) -> Batch:
    config = TrainConfig.for_preset("asag-a-tiny", ".", ".", batch_size=images)
    loaded = random_pieces(config, 160, 192, 3)[0].batch
    return Batch(loaded.images.float() / 255, loaded.sizes, loaded.targets)


@pytest.mark.parametrize("decoder", ["adamixer", "deformable"])
def test_only_backbone_and_neck_compute_in_reduced_precision(decoder: str) -> None:
    detector = random_detector(small_config(decoder=decoder, **FROZEN)).train()
    batch = batch_of(2)
    inside: dict[str, set[tuple[bool, torch.dtype]]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inside.setdefault(name, set()).add((torch.is_autocast_enabled("cpu"), output.dtype))

        return hook

    for name, module in detector.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(watch(name.split(".")[0]))
    training = ASAGTraining(detector, ASAGSettings(first_epoch=1))
    outputs = training.outputs(batch, Step(0, feature_precision=torch.bfloat16))
    assert inside["backbone"] == inside["neck"] == {(True, torch.bfloat16)}
    assert {kind for name in inside.keys() - {"backbone", "neck"} for kind in inside[name]} == {(False, torch.float32)}
    assert {"anchor_generator", "proposals", "heads"} < inside.keys()
    anchors = outputs.anchors
    found = [outputs.sizes, anchors.p5, anchors.p6, anchors.boxes]
    found += [level.anchors for level in anchors.probed.values()]
    found += [value for stage in outputs.stages.values() for value in stage]
    assert {value.dtype for value in found} == {torch.float32}
    losses = training.losses(outputs, batch.targets, torch.ones(3))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("objects", [0, 1])
def test_every_parameter_that_trains_has_a_gradient_without_any_patch(decoder: str, levels: str, objects: int) -> None:
    # Else DistributedDataParallel would wait for it forever.
    detector = random_detector(small_config(decoder=decoder, levels=levels, **FROZEN)).train()
    images, sizes = torch.rand(2, 3, 160, 192), torch.tensor([[160.0, 192.0]] * 2)
    large = {"boxes": torch.tensor([[0.5, 0.5, 0.9, 0.9]])[:objects], "labels": torch.zeros(objects, dtype=torch.int64)}
    training = ASAGTraining(detector, ASAGSettings())
    outputs = training.outputs(Batch(images, sizes, [large] * 2), Step(0))
    assert outputs.anchors.patches == 0
    losses = training.losses(outputs, [large] * 2, torch.ones(3))
    torch.stack([loss * training.weights[name] for name, loss in losses.items()]).sum().backward()
    without = {name for name, parameter in detector.named_parameters() if parameter.grad is None}
    assert without == {name for name, parameter in detector.named_parameters() if not parameter.requires_grad}
    assert bool(without) == (levels != "P3P6")
    slow = {id(each) for group in training.parameter_groups() if group.factor < 1 for each in group.parameters}
    moving = {name for name, parameter in detector.named_parameters() if id(parameter) in slow}
    assert moving == {name for name in dict(detector.named_parameters()) if "attention.offsets." in name}
    assert bool(moving) == (decoder == "deformable")


@pytest.mark.parametrize(("decoder", "epoch"), [("adamixer", 0), ("adamixer", 1), ("deformable", 1)])
def test_counts_are_the_same_before_and_after_the_forward_pass(decoder: str, epoch: int) -> None:
    detector = random_detector(small_config(decoder=decoder), seed=2).train()
    training = ASAGTraining(detector, ASAGSettings())
    batch = batch_of(2)
    before = {name: value.clone() for name, value in detector.named_buffers()}

    def step() -> Step:
        return Step(epoch, image_generators(0, [(epoch, 0), (epoch, 1)]))

    counted = training.counts(batch, step())
    assert all(torch.equal(value, before[name]) for name, value in detector.named_buffers())
    outputs = training.outputs(batch, step())
    assert torch.equal(counted, training.counts(batch, step(), outputs))
    assert counted.tolist() == [14, outputs.anchors.patches, 2]
    assert outputs.anchors.patches > 0


def test_the_first_epoch_and_the_fall_of_the_noise_are_settings() -> None:
    detector = random_detector(small_config(**FROZEN)).train()
    batch = batch_of(1)

    def outputs(epoch: int, **settings: Any) -> Any:
        training = ASAGTraining(detector, ASAGSettings(**settings))
        return training.outputs(batch, Step(epoch, image_generators(0, [(0, 0)])))

    second = outputs(1)
    assert torch.equal(outputs(0, first_epoch=1).anchors.boxes, second.anchors.boxes)
    assert not torch.equal(outputs(0).anchors.boxes, second.anchors.boxes)
    assert outputs(0, denoising_scale=0.4).noised == 200
    assert outputs(4, denoising_scale=0.4, denoising_fall=0.1).noised == 0
    assert outputs(2, denoising_scale=0.4, denoising_fall=0.1, first_epoch=2).noised == 0
