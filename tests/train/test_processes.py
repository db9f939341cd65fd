"""A step is the same however many processes and pieces it is cut into; a run survives being killed."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import socket
import time

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import distributed

from asag.checkpoint import CheckpointInfo, save_detector
from asag.families import find_preset
from asag.families.adamixer.training.settings import AdaMixerSettings
from asag.families.asag.training.settings import ASAGSettings
from asag.train.checkpointing import kept_states
from asag.train.config import TrainConfig
from asag.train.devices import check_gpus
from asag.train.loading import StepSampler
from asag.train.loop import WEIGHTS_FILE, train
from asag.train.pictures import read_table
from asag.train.processes import Processes, joined_processes
from asag.train.reporting import LOSSES_FILE
from asag.train.run import CONFIG_FILE
from asag.train.step import StepMaker
from tests.families.adamixer.small_detector import random_detector
from tests.train import child_run


@pytest.fixture
def equal_shapes(shapes, tmp_path):
    """The synthetic images, all cut to one size: else the padding would differ with the pieces."""
    root = tmp_path / "equal"
    (root / "annotations").mkdir(parents=True)
    content = json.loads((shapes / "annotations" / "instances_train2017.json").read_text())
    side = min(min(image["height"], image["width"]) for image in content["images"])
    (root / "train2017").mkdir()
    for image in content["images"]:
        with Image.open(shapes / "train2017" / image["file_name"]) as picture:
            name = f"{image['id']}.png"
            picture.crop((0, 0, side, side)).save(root / "train2017" / name)
        image |= {"file_name": name, "height": side, "width": side}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def config(frozen_preset, equal_shapes, tmp_path):
    return TrainConfig(
        preset=frozen_preset,
        data=equal_shapes,
        output=tmp_path / "run",
        steps=2,
        batch_size=5,
        # AdamW's first steps blow up rounding errors of small gradients; small ones keep the second step comparable.
        learning_rate=1e-7,
        backbone_learning_rate=1e-7,
        gradient_clip=1e9,
        settings=ASAGSettings(denoising_scale=0.4),
        # The first step is of epoch 0, the second of epoch 1: patches from ground truth, and predicted ones.
        warmup_steps=0,
        workers=0,
        device="cpu",
        log_interval=1,
        evaluation_interval=0,
    )


@pytest.fixture
def gradients(monkeypatch):
    """The gradients of the steps of this process, by step."""
    make, found = StepMaker.make, {}

    def recording(self, pieces, epoch):
        result = make(self, pieces, epoch)
        named = self._state.detector.named_parameters()
        found[self._state.step] = {name: value.grad.clone() for name, value in named if value.requires_grad}
        return result

    monkeypatch.setattr(StepMaker, "make", recording)
    return found


def run_two(run, folder, **variables):
    """What two processes print that run a configuration together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        child_run.start(run, folder / f"child{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **variables)
        for rank in (0, 1)
    ]
    printed = [child.communicate(timeout=240)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], printed
    return printed


def assert_gradients_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.fixture(params=["ASAG", "recollection"])
def method(request, config, tmp_path):
    """The run above, or that of a detector whose stages train on several sets of queries.

    It does not start from random weights: all its boxes would be the whole image, and where an object ends at the
    image's edge, rounding would decide the sign of the L1 loss's gradient.
    """
    if request.param == "ASAG":
        return config
    preset = find_preset(child_run.RECOLLECTED)
    weights = tmp_path / "weights.safetensors"
    names = dict(enumerate("abcdef"))
    start = random_detector(dataclasses.replace(preset.config, num_classes=len(names)))
    save_detector(weights, start, CheckpointInfo.of(preset, names))
    # Rounding of the first step, however small, would grow through three stages of random weights in the second.
    rates = {"learning_rate": 1e-12, "backbone_learning_rate": 1e-12}
    settings = AdaMixerSettings("batched")
    return dataclasses.replace(config, preset=preset.name, settings=settings, initial_weights=weights, **rates)


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(method, gradients, tmp_path):
    config = method
    whole = train(config, progress=False)
    folder = tmp_path / "gradients"
    folder.mkdir()
    output = tmp_path / "two"
    printed = run_two(dataclasses.replace(config, output=output), tmp_path, ASAG_TEST_GRADIENTS=str(folder))
    for step in (0, 1):
        assert_gradients_close(torch.load(folder / f"{step}.pt", weights_only=True), gradients[step])
    # Only the first one writes and prints, and what it tells is of the whole batch.
    assert "step 2/2" in printed[0]
    assert "step" not in printed[1]
    rows, expected = read_table(output / LOSSES_FILE), read_table(config.output / LOSSES_FILE)
    assert [row["step"] for row in rows] == [1, 2]
    for name in whole.losses:
        assert rows[0][name] == pytest.approx(expected[0][name], rel=1e-3), name
    assert json.loads((output / CONFIG_FILE).read_text())["processes"] == 2


@pytest.mark.slow
def test_two_processes_end_with_the_same_statistics_of_norms_that_learn(config, micro_preset, tmp_path):
    learning = dataclasses.replace(config, preset=micro_preset, output=tmp_path / "two", ema_decay=0.5)
    printed = run_two(learning, tmp_path, ASAG_TEST_BUFFERS=str(tmp_path))
    first, second = (torch.load(tmp_path / f"buffers-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert any("running_mean" in name for name in first)
    assert not [name for name, value in first.items() if not torch.equal(second[name], value)]
    # What is written is what all of them have, here the average of the weights.
    written = safetensors.torch.load_file(learning.output / WEIGHTS_FILE)
    averaged = {name.removeprefix("average.module."): value for name, value in first.items() if "average." in name}
    assert averaged
    assert not [name for name, value in averaged.items() if name in written and not torch.equal(written[name], value)]
    assert sum("norms that learn see the images of one process" in text for text in printed) == 1


def test_a_resumed_run_has_one_folder_for_all_processes(config, monkeypatch):
    train(dataclasses.replace(config, stop_after=1), progress=False)
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, 4, value])
    with pytest.raises(ValueError, match=r"states of different steps \(1, 4\): the run's folder must be the same"):
        train(dataclasses.replace(config, resume=True), progress=False)


def test_after_an_error_a_process_does_not_wait_for_the_others(monkeypatch):
    calls = []
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(distributed, name, lambda *_, name=name, **__: calls.append(name))
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "here", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(logging.getLogger("asag.train"), "level", logging.WARNING)
    with joined_processes() as processes:
        assert (processes.rank, processes.count) == (1, 2)
    assert calls == ["init_process_group", "destroy_process_group"]
    with pytest.raises(ValueError, match="mine"), joined_processes():
        raise ValueError("mine")
    assert calls[2:] == ["init_process_group"]


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_gpus(torch.device("cuda"), Processes(count=8, local_count=4))
    check_gpus(torch.device("cuda:1"), Processes())
    check_gpus(torch.device("cpu"), Processes(count=8, local_count=8))
    with pytest.raises(ValueError, match=r"8 processes on a machine where torch sees 4 GPUs.*--nproc-per-node 4"):
        check_gpus(torch.device("cuda"), Processes(count=8, local_count=8))
    with pytest.raises(ValueError, match="cuda:1 is one GPU for 2 processes"):
        check_gpus(torch.device("cuda:1"), Processes(count=2, local_count=2))


def test_pieces_make_the_step_of_the_whole(config, gradients, tmp_path):
    train(config, progress=False)
    expected = dict(gradients)
    result = train(dataclasses.replace(config, output=tmp_path / "pieces", accumulate=3), progress=False)
    assert result.finished
    for step in (0, 1):
        assert_gradients_close(gradients[step], expected[step])


def test_norms_that_learn_do_not_count_a_piece_twice(config, micro_preset, tmp_path):
    learning = dataclasses.replace(config, preset=micro_preset, steps=1, accumulate=2)
    train(learning, progress=False)
    state = safetensors.torch.load_file(config.output / WEIGHTS_FILE)
    counts = {int(value) for name, value in state.items() if name.endswith("num_batches_tracked")}
    assert counts == {2}


def test_a_run_says_what_its_training_remarks(config, caplog):
    settings = AdaMixerSettings("batched")
    config = dataclasses.replace(config, preset=child_run.RECOLLECTED, settings=settings, steps=1, batch_size=1)
    with caplog.at_level(logging.INFO, logger="asag.train"):
        train(config, progress=False)
    assert "recollection: 6 copies of 3 stages a step, batched" in caplog.text


def test_more_pieces_than_images_are_refused(config):
    with pytest.raises(ValueError, match="raise batch_size"):
        train(dataclasses.replace(config, accumulate=6), progress=False)


@given(
    images=st.integers(1, 30),
    batch=st.integers(1, 12),
    accumulate=st.integers(1, 3),
    count=st.integers(1, 3),
    first=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_the_pieces_of_all_processes_make_up_the_batch(images, batch, accumulate, count, first):
    if min(images, batch) < accumulate * count:
        with pytest.raises(ValueError, match="cannot be cut"):
            StepSampler(images, batch, 8, 1, accumulate=accumulate, rank=0, count=count)
        return
    whole = list(StepSampler(images, batch, 8, 1, first))
    shares = [
        list(StepSampler(images, batch, 8, 1, first, accumulate=accumulate, rank=rank, count=count))
        for rank in range(count)
    ]
    for step, expected in enumerate(whole):
        pieces = [piece for share in shares for piece in share[step * accumulate : (step + 1) * accumulate]]
        assert sorted(place for piece in pieces for place in piece) == sorted(expected)
        lengths = [len(piece) for piece in pieces]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_trains(config, precision):
    config = dataclasses.replace(config, precision=precision, channels_last=True, batch_size=2, steps=4)
    result = train(dataclasses.replace(config, stop_after=2), progress=False)
    assert not result.finished
    result = train(dataclasses.replace(config, resume=True), progress=False)
    assert result.finished
    assert all(map(math.isfinite, result.losses.values()))
    state = torch.load(kept_states(config.output)[-1][1], weights_only=True)
    assert ("scale" in state["scaler"]) == (precision == "float16")


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_bits(config, tmp_path):
    config = dataclasses.replace(config, steps=8, batch_size=2, checkpoint_interval=1, learning_rate=1e-3)
    train(config, progress=False)
    killed = dataclasses.replace(config, output=tmp_path / "killed")
    child = child_run.start(dataclasses.replace(killed, steps=8), tmp_path / "child")
    limit = time.monotonic() + 120
    while not kept_states(killed.output) and child.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    steps = [step for step, _ in kept_states(killed.output)]
    assert steps, "the child wrote no state"
    assert steps[-1] < 8, "the child was not killed in time"
    result = train(dataclasses.replace(killed, resume=True), progress=False)
    assert result.finished
    ours, theirs = (safetensors.torch.load_file(run.output / WEIGHTS_FILE) for run in (killed, config))
    assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not [path for path in killed.output.rglob(".*") if path.is_file()]
