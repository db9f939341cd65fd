import dataclasses
import errno
import os
import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from asag.checkpoint import load_detector
from asag.train.checkpointing import (
    TrainingState,
    has_run,
    keep_state,
    kept_states,
    load_state,
    remove_leftovers,
    resume_state,
    save_state,
    state_path,
)
from asag.train.config import TrainConfig
from asag.train.schedule import build_optimizer, build_schedule
from asag.training.protocol import rates_of


@pytest.fixture
def config(micro_preset, tmp_path):
    return TrainConfig(preset="micro", data=tmp_path, output=tmp_path, steps=5)


def make_state(config, seed):
    from asag.detector import build_detector
    from asag.families import find_preset

    torch.manual_seed(seed)
    detector = build_detector(find_preset(config.preset).config)
    optimizer = build_optimizer(rates_of(detector), config)
    schedule = build_schedule(optimizer, config, 5, 5)
    return TrainingState(detector, None, optimizer, schedule)


def step(state):
    for parameter in state.detector.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    state.optimizer.step()
    state.schedule.step()
    state.step += 1


def test_everything_comes_back(micro_preset, config, tmp_path):
    state = make_state(config, seed=1)
    step(state)
    path = state_path(tmp_path, 1)
    assert not has_run(tmp_path)
    save_state(path, state, config.computation())
    assert has_run(tmp_path)
    expected = torch.rand(2)
    restored = make_state(config, seed=2)
    load_state(path, restored, dataclasses.replace(config, workers=7, resume=True, log_interval=3).computation())
    assert restored.step == 1
    assert torch.equal(torch.rand(2), expected)
    step(state)
    step(restored)
    assert restored.schedule.get_last_lr() == state.schedule.get_last_lr()
    for ours, theirs in zip(restored.detector.parameters(), state.detector.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_interrupted_write_keeps_the_older_file(micro_preset, config, tmp_path, monkeypatch):
    state = make_state(config, seed=1)
    path = state_path(tmp_path, 1)
    save_state(path, state, config.computation())
    before = path.read_bytes()

    def fail(content, stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        save_state(path, state, config.computation())
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_state_without_an_option_had_it_off(micro_preset, config, tmp_path):
    state = make_state(config, seed=1)
    path = state_path(tmp_path, 1)
    earlier = {name: value for name, value in config.computation().items() if name not in ("freeze", "stored_pixels")}
    save_state(path, state, earlier)
    load_state(path, state, config.computation())
    with pytest.raises(ValueError, match=r"freeze None -> \['neck'\]"):
        load_state(path, state, dataclasses.replace(config, freeze=("neck",)).computation())


def test_damaged_or_foreign_files_are_refused_in_one_line(micro_preset, config, tmp_path):
    state = make_state(config, seed=1)
    path = state_path(tmp_path, 1)
    save_state(path, state, config.computation())
    path.write_bytes(path.read_bytes()[:1000])
    foreign = {"damaged": path.read_bytes(), "object": pickle.dumps(config), "empty": b""}
    for content in foreign.values():
        path.write_bytes(content)
        with pytest.raises(ValueError, match="anew") as error:
            load_state(path, state, config.computation())
        assert "\n" not in str(error.value)
    torch.save({"format": 0}, path)
    with pytest.raises(ValueError, match="not a training state"):
        load_state(path, state, config.computation())
    with pytest.raises(ValueError, match=r"not a readable|no asag description"):
        load_detector(path)


def test_another_detector_is_refused(micro_preset, config, tmp_path):
    path = state_path(tmp_path, 1)
    save_state(path, make_state(config, seed=1), {})
    larger = make_state(dataclasses.replace(config, preset="asag-a-tiny"), seed=1)
    with pytest.raises(ValueError, match="does not fit this detector"):
        load_state(path, larger, {})


def test_the_last_states_are_kept(micro_preset, config, tmp_path):
    state = make_state(config, seed=1)
    for _ in range(4):
        step(state)
        keep_state(tmp_path, state, {}, keep=2)
    assert [number for number, _ in kept_states(tmp_path)] == [3, 4]
    # A run that goes on from an older state writes anew what came after it.
    state.step = 2
    keep_state(tmp_path, state, {}, keep=2)
    assert [number for number, _ in kept_states(tmp_path)] == [2]


def test_resuming_passes_over_a_damaged_state(micro_preset, config, tmp_path, caplog):
    state = make_state(config, seed=1)
    for _ in range(2):
        step(state)
        keep_state(tmp_path, state, {}, keep=2)
    newest = state_path(tmp_path, 2)
    newest.write_bytes(newest.read_bytes()[:2000])
    restored = make_state(config, seed=2)
    assert resume_state(tmp_path, restored, {}) == state_path(tmp_path, 1)
    assert restored.step == 1
    assert "going back to an older state" in caplog.text
    state_path(tmp_path, 1).unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        resume_state(tmp_path, restored, {})
    newest.unlink()
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        resume_state(tmp_path, restored, {})


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("No space left on device (28)\nat ..")]
)
def test_a_full_disk_keeps_the_older_states(micro_preset, config, tmp_path, monkeypatch, failure):
    state = make_state(config, seed=1)
    for _ in range(2):
        step(state)
        keep_state(tmp_path, state, {}, keep=2)

    def fail(content, stream):
        stream.write(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    step(state)
    with pytest.raises(OSError, match=r"^cannot write .*state-0*3\.pt: No space left on device") as error:
        keep_state(tmp_path, state, {}, keep=2)
    assert "\n" not in str(error.value)
    assert [number for number, _ in kept_states(tmp_path)] == [1, 2]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_the_system_tells_why_a_state_could_not_be_written(micro_preset, config, tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full, a disk without space")
    monkeypatch.setattr("asag.train.checkpointing.atomic_path", lambda path: nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match=r"^cannot write .*state-0*0\.pt: No space left on device$"):
        keep_state(tmp_path, make_state(config, seed=1), {}, keep=2)


def test_leftovers_of_a_killed_run_are_removed(micro_preset, config, tmp_path):
    state = make_state(config, seed=1)
    keep_state(tmp_path, state, {}, keep=2)
    leftovers = [tmp_path / "checkpoints" / ".state-00000007.x1y2.pt", tmp_path / ".weights.safetensors.77"]
    for path in leftovers:
        path.write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path in leftovers)
    assert has_run(tmp_path)
