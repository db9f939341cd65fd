"""Checkpoints: what is written comes back, and what cannot be read is one clear line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from asag.checkpoint import CheckpointInfo, load_detector, save_detector
from tests.builders import random_detector, small_config, small_info, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model.safetensors")


def rewrite(source: Path, target: Path, **metadata: str) -> Path:
    """The same tensors with other metadata."""
    safetensors.torch.save_file(safetensors.torch.load_file(source), target, metadata or None)
    return target


def description_of(path: Path) -> dict:
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["asag"])


def check_refused(path: Path, *parts: str) -> None:
    with pytest.raises(ValueError, match=path.name) as caught:
        load_detector(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("decoder", ["adamixer", "sparse_rcnn", "deformable"])
def test_round_trip(tmp_path: Path, decoder: str) -> None:
    detector = random_detector(
        small_config(decoder=decoder, levels="P4P6", head="aux_1", patch_capacity=(3, 5)), seed=3
    )
    info = small_info((96, 128))
    save_detector(tmp_path / "new" / "model.safetensors", detector, info)
    loaded, loaded_info = load_detector(tmp_path / "new" / "model.safetensors")
    assert loaded_info == info
    assert loaded.config == detector.config
    assert not loaded.training
    state, loaded_state = detector.state_dict(), loaded.state_dict()
    assert list(state) == list(loaded_state)
    assert all(torch.equal(state[name], loaded_state[name]) for name in state)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_a_string_is_a_path(checkpoint: Path) -> None:
    assert load_detector(str(checkpoint))[1] == small_info()


def test_an_interrupted_write_leaves_the_old_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(checkpoint.read_bytes())

    def full_disk(tensors: object, target: Path, metadata: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_detector(path, random_detector(seed=9), small_info())
    assert path.read_bytes() == checkpoint.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_writing_replaces_the_file_in_one_step(checkpoint: Path, tmp_path: Path) -> None:
    """Who has the old file open keeps reading the old one: it is replaced, not written into."""
    path, old = tmp_path / "model.safetensors", tmp_path / "old.safetensors"
    path.write_bytes(checkpoint.read_bytes())
    old.hardlink_to(path)
    save_detector(path, random_detector(seed=9), small_info())
    assert old.read_bytes() == checkpoint.read_bytes()
    assert path.read_bytes() != checkpoint.read_bytes()


def test_classes_must_fit(tmp_path: Path) -> None:
    info = dataclasses.replace(small_info(), category_ids=(1, 2), category_names=("a", "b"))
    with pytest.raises(ValueError, match="2 categories for a detector of 3 classes"):
        save_detector(tmp_path / "model.safetensors", random_detector(), info)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="2 category ids for 1 category names"):
        CheckpointInfo("asag-a-tiny", (1, 2), ("a",))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such checkpoint"):
        load_detector(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError):
        load_detector(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not tensors", b"\xff" * 64])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    check_refused(path, "not a readable safetensors file")


def test_truncated(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(checkpoint.read_bytes()[:-1000])
    check_refused(path, "not a readable safetensors file")


def test_without_description(checkpoint: Path, tmp_path: Path) -> None:
    check_refused(rewrite(checkpoint, tmp_path / "plain.safetensors"), "no asag description")
    check_refused(rewrite(checkpoint, tmp_path / "other.safetensors", format="pt"), "no asag description")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"config": 3, "info": {}}', '{"config": {}, "info": {"preset": 1}}']
)
def test_damaged_description(checkpoint: Path, tmp_path: Path, text: str) -> None:
    check_refused(rewrite(checkpoint, tmp_path / "model.safetensors", asag=text), "no asag description")


def test_options_of_a_newer_version_are_named(checkpoint: Path, tmp_path: Path) -> None:
    description = description_of(checkpoint)
    description["config"]["telepathy"] = True
    path = rewrite(checkpoint, tmp_path / "model.safetensors", asag=json.dumps(description))
    check_refused(path, "telepathy", "newer version")


def test_tensors_of_another_configuration(checkpoint: Path, tmp_path: Path) -> None:
    description = description_of(checkpoint)
    description["config"]["num_classes"] = 4
    path = rewrite(checkpoint, tmp_path / "model.safetensors", asag=json.dumps(description))
    check_refused(path, "do not fit its configuration", "class_logits")


def test_a_missing_tensor_is_named(checkpoint: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(checkpoint)
    del tensors["neck.inner_blocks.0.0.weight"]
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, {"asag": json.dumps(description_of(checkpoint))})
    check_refused(path, "neck.inner_blocks.0.0.weight")
