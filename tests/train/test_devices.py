"""Training and inference keep to one device and give there what they give on the CPU."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.amp import GradScaler

from asag.deploy import DeployedDetector
from asag.families import family_of
from asag.runtime.backends.pytorch_session import PyTorchSession
from asag.runtime.preprocessing import as_image, prepare
from asag.train.checkpointing import TrainingState
from asag.train.config import TrainConfig
from asag.train.processes import Processes
from asag.train.schedule import build_optimizer, build_schedule
from asag.train.step import StepMaker, prepare_detector
from benchmarks.training import random_pieces
from tests.builders import random_detector, random_picture, small_config, small_info
from tests.other_device import other_device

CPU = torch.device("cpu")


def one_step(
    decoder: str, accumulate: int, epoch: int, elsewhere: bool, batch_size: int = 4, waits: list[str] | None = None
) -> list[float]:
    """Losses, the gradient's norm, and the sum of all weights after the step; nothing where `waits` gets the step's."""
    detector = random_detector(small_config(decoder=decoder))
    sizes = {"batch_size": batch_size, "accumulate": accumulate}
    config = TrainConfig.for_preset("asag-a-tiny", ".", ".", denoising_scale=0.4, **sizes)
    pieces = random_pieces(config, 160, 192, detector.config.classes)
    with other_device(waits) if elsewhere else nullcontext(CPU) as device:
        prepare_detector(detector, config, device)
        training = family_of(detector.config).training(detector, config.settings)
        optimizer = build_optimizer(training.parameter_groups(), config)
        schedule = build_schedule(optimizer, config, 2, 2)
        state = TrainingState(detector, None, optimizer, schedule, GradScaler("cpu", enabled=False))
        maker = StepMaker(state, training, config, Processes(), device)
        before = len(waits or ())
        result = maker.make(pieces, epoch)
        if waits is not None:
            del waits[:before]
            return []
        weights = sum(parameter.detach().double().sum() for parameter in detector.parameters())
        return [float(value) for value in (*result.losses.values(), result.gradient_norm, weights)]


@pytest.mark.parametrize(("accumulate", "epoch"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("decoder", ["adamixer", "sparse_rcnn", "deformable"])
def test_a_training_step(decoder: str, accumulate: int, epoch: int) -> None:
    expected = one_step(decoder, accumulate, epoch, elsewhere=False)
    assert one_step(decoder, accumulate, epoch, elsewhere=True) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("batch_size", [2, 7])
@pytest.mark.parametrize(
    # One for each RoIAlign; the others: candidates of each level, the number of queries, the costs, and whether the
    # loss is finite.
    ("decoder", "epoch", "most"),
    [("adamixer", 0, 1 + 3), ("adamixer", 1, 1 + 5), ("sparse_rcnn", 1, 5 + 5)],
)
def test_the_host_seldom_waits_for_a_gpu(decoder: str, epoch: int, most: int, batch_size: int) -> None:
    waits: list[str] = []
    one_step(decoder, 1, epoch, elsewhere=True, batch_size=batch_size, waits=waits)
    assert len(waits) <= most, waits


def test_waits_are_seen() -> None:
    waits: list[str] = []
    with other_device(waits) as device:
        there = torch.arange(3).to(device, non_blocking=True)
        assert not waits
        there.to(device)
        there[there + 0]
        assert not waits
        for wait in (
            there.cpu,
            lambda: torch.ones(2).to(device),
            lambda: int(there.max()),
            lambda: there[there > 1],
            there.nonzero,
            lambda: there[torch.tensor([1])],
            lambda: torch.tensor([1], device=device),
        ):
            waits.clear()
            wait()
            assert len(waits) == 1, waits


@pytest.mark.parametrize("decoder", ["adamixer", "sparse_rcnn", "deformable"])
def test_the_reference_session(decoder: str) -> None:
    deployed = DeployedDetector(random_detector(small_config(decoder=decoder)), small_info())
    images = [as_image(random_picture(seed, 120, 150)) for seed in range(2)]
    session = PyTorchSession(deployed, "small", "cpu")
    tensors = prepare(images, session.metadata)
    expected, stages = session.run(tensors), session.stage_values(tensors)
    with other_device() as device:
        elsewhere = PyTorchSession(deployed, "small", str(device))
        found, found_stages = elsewhere.run(tensors), elsewhere.stage_values(tensors)
    for wanted, given in ((expected, found), (stages, found_stages)):
        assert wanted.keys() == given.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(given[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_tensors_of_two_devices_do_not_mix() -> None:
    with other_device() as device:
        here, there = torch.ones(2), torch.ones(2).to(device)
        assert there.device.type == device.type
        assert float((there * 2 + torch.tensor(1.0)).sum()) == 6
        with pytest.raises(RuntimeError, match="two devices"):
            there + here
