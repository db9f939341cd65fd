"""One step: reduced precision, compilation, and norms that learn in several processes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.amp import GradScaler

from asag.detector import Detector
from asag.families import family_of
from asag.train.averaging import average_of
from asag.train.checkpointing import TrainingState
from asag.train.config import TrainConfig
from asag.train.processes import ALONE, Processes
from asag.train.schedule import build_optimizer, build_schedule
from asag.train.step import StepMaker, feature_precision, prepare_detector, synchronize_norms
from benchmarks.training import random_pieces
from tests.builders import random_detector, small_config

CPU = torch.device("cpu")
TWO = Processes(rank=0, count=2, local_rank=0, local_count=2)
FROZEN = {"train_batch_statistics": False}


def recipe(**changes: Any) -> TrainConfig:
    return TrainConfig.for_preset("asag-a-tiny", ".", ".", batch_size=2, device="cpu", **changes)


def make_step(
    detector: Detector, config: TrainConfig, scaler: GradScaler | None = None, processes: Processes = ALONE
) -> tuple[StepMaker, TrainingState]:
    training = family_of(detector.config).training(detector, config.settings)
    optimizer = build_optimizer(training.parameter_groups(), config)
    state = TrainingState(detector, None, optimizer, build_schedule(optimizer, config, 9, 9))
    state.scaler = scaler or state.scaler
    return StepMaker(state, training, config, processes, CPU), state


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    steps = []
    for scaler in (None, GradScaler("cpu", init_scale=2.0**12)):
        detector = random_detector(small_config(**FROZEN)).train()
        config = recipe(gradient_clip=0.1)
        maker, _ = make_step(detector, config, scaler)
        norm = maker.make(random_pieces(config, 160, 192, 3), 1).gradient_norm
        steps.append([norm, *(parameter.detach() for parameter in detector.parameters())])
    for plain, scaled in zip(*steps, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-7)


def test_a_step_whose_scaled_gradients_are_not_finite_is_left_out() -> None:
    detector = random_detector(small_config(**FROZEN)).train()
    before = [parameter.detach().clone() for parameter in detector.parameters()]
    scaler = GradScaler("cpu", init_scale=2.0**127)
    config = recipe()
    maker, state = make_step(detector, config, scaler)
    assert not maker.make(random_pieces(config, 160, 192, 3), 1).gradient_norm.isfinite()
    assert all(torch.equal(old, new) for old, new in zip(before, detector.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**126
    assert state.schedule.last_epoch == 1


def test_compiled_parts_meet_many_image_sizes_without_compiling_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend=counter))
    torch._dynamo.reset()
    detector = random_detector(small_config(**FROZEN))
    config = recipe(compile=True)
    prepare_detector(detector, config, CPU)
    maker, _ = make_step(detector, config)
    graphs = []
    for height, width in ((160, 192), (192, 160), (160, 224), (224, 224), (96, 320)):
        maker.make(random_pieces(config, height, width, 3), 1)
        graphs.append(counter.frame_count)
    # Backbone and neck are a graph each: no breaks. The second size makes them take any.
    assert graphs == [2, 4, 4, 4, 4]


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_without_bfloat16_computes_in_float16(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    wanted = torch.bfloat16 if native else torch.float16
    assert feature_precision(recipe(), torch.device("cuda")) == wanted
    assert feature_precision(recipe(precision="float32"), torch.device("cuda")) is None
    assert feature_precision(recipe(), CPU) is None


class Exchanges(nn.Module):
    """In place of DistributedDataParallel: notes which pieces exchange their gradients."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module, self.options = module, options
        self.alone = False
        self.pieces: list[str] = []

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.pieces.append("alone" if self.alone else "exchanged")
        return self.module(*arguments, **options)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.alone = True
        yield
        self.alone = False


def test_gradients_are_exchanged_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asag.train.step.DistributedDataParallel", Exchanges)
    monkeypatch.setattr(Processes, "sum", lambda self, values: self.count * values)
    config = recipe(accumulate=2)
    maker, _ = make_step(random_detector(small_config(**FROZEN)).train(), config, processes=TWO)
    maker.make(random_pieces(config, 160, 192, 3), 0)
    exchanges = maker._synchronized
    assert isinstance(exchanges, Exchanges)
    assert exchanges.pieces == ["alone", "exchanged"]
    assert not exchanges.options.get("find_unused_parameters", False)


def test_norms_that_learn_are_synchronized_on_gpus() -> None:
    detector = random_detector(small_config(train_batch_statistics=True)).train()
    plain = random_detector(small_config(train_batch_statistics=True))
    parameters = dict(detector.named_parameters())
    synchronize_norms(detector, torch.device("cuda"), TWO)
    norms = list(detector.backbone.norms())
    assert {type(norm) for norm in norms} == {nn.SyncBatchNorm}
    assert len(norms) == len(list(plain.backbone.norms()))
    assert all(norm.training for norm in norms)
    assert all(parameters[name] is parameter for name, parameter in detector.named_parameters())
    # What is saved fits a detector without them, and what is deployed or averaged computes the same.
    assert list(detector.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(detector.state_dict())
    images = torch.rand(1, 3, 64, 96)
    averaged = average_of(detector, 0.9).module
    folded = copy.deepcopy(detector.backbone).eval()
    folded.fold()
    with torch.no_grad():
        expected = plain.eval().backbone(images)
        for backbone in (detector.eval().backbone, averaged.backbone, folded):
            for found, wanted in zip(backbone(images), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("learn", "device", "processes"),
    [(False, "cuda", TWO), (True, "cuda", ALONE), (True, "cpu", TWO), (True, "cpu", ALONE)],
)
def test_other_norms_stay_as_they_are(
    learn: bool, device: str, processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    detector = random_detector(small_config(train_batch_statistics=learn)).train()
    with caplog.at_level(logging.WARNING, logger="asag.train"):
        synchronize_norms(detector, torch.device(device), processes)
        synchronize_norms(detector, torch.device(device), dataclasses.replace(processes, rank=1))
    assert {type(norm) for norm in detector.backbone.norms()} == {nn.BatchNorm2d}
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (learn and device == "cpu" and processes.several)
