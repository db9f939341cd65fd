"""Published checkpoint files: what they hold, what they are, and what becomes of them."""

from __future__ import annotations

import argparse
import collections
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from asag.checkpoint import load_detector
from asag.datasets import COCO_CATEGORIES
from asag.detector import Detector, build_detector
from asag.families import find_preset
from asag.families.asag.config import ASAGConfig
from asag.families.asag.presets import PRESETS
from asag.families.asag.published import translate_name
from asag.foreign_files import read_foreign
from asag.published import categories, convert_published, identify
from tests.builders import random_detector


def published_names(detector: Detector, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The detector's tensors under published names, of which `shapes` lists all."""
    ours = detector.state_dict()
    state = {}
    for name in shapes:
        target = translate_name(name)
        assert target is not None
        state[name] = ours[target]
    return state


@pytest.fixture(scope="module")
def shapes(goldens: Path) -> dict[str, list[int]]:
    return json.loads((goldens / "asag_s_r50_100.shapes.json").read_text())


@pytest.fixture(scope="module")
def published(shapes: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Detector]:
    """A file as the authors write it, and the detector whose tensors it holds."""
    detector = random_detector(ASAGConfig("sparse_rcnn", "resnet50", 100))
    path = tmp_path_factory.mktemp("published") / "asag_s.pth"
    content = {
        "model": published_names(detector, shapes),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 2e-4}]},
        "lr_scheduler": {"milestones": collections.Counter({24: 1, 33: 1})},
        "epoch": 35,
        "args": argparse.Namespace(lr=2e-4, output_dir=Path("out")),
    }
    torch.save(content, path)
    return path, detector


def test_a_published_file_becomes_a_checkpoint_with_the_same_tensors(
    published: tuple[Path, Detector], tmp_path: Path
) -> None:
    path, detector = published
    found = convert_published(path, tmp_path / "ours.safetensors")
    loaded, info = load_detector(tmp_path / "ours.safetensors")
    assert found.preset == info.preset == "asag-s-r50-3x-100"
    assert found.alternatives == ("asag-s-r50-3x-100",)
    preset = find_preset(found.preset)
    assert loaded.config == preset.config
    assert info.input == preset.input
    assert len(info.category_ids) == 80
    assert info.category_names[0] == "person"
    for tensor_name, tensor in detector.state_dict().items():
        if not tensor_name.endswith("num_batches_tracked"):
            assert torch.equal(loaded.state_dict()[tensor_name], tensor), tensor_name


def test_another_preset_than_the_tensors_is_refused(published: tuple[Path, Detector], tmp_path: Path) -> None:
    output = tmp_path / "ours.safetensors"
    with pytest.raises(ValueError, match=r"not those of asag-a-r50-1x-100; they fit asag-s-r50-3x-100"):
        convert_published(published[0], output, "asag-a-r50-1x-100")
    with pytest.raises(ValueError, match="no preset 'nothing'"):
        convert_published(published[0], output, "nothing")
    assert not output.exists()


@pytest.mark.parametrize(
    ("description", "names"),
    [
        ({}, ("class 1", "class 2")),
        ({"id2label": {"0": "cat", "1": "dog"}}, ("cat", "dog")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, ("class 1", "class 2")),
        ({"CLASSES": ("cat", "dog")}, ("cat", "dog")),
        ({"dataset_meta": {"classes": ["cat", "dog"]}}, ("cat", "dog")),
        ({"dataset_meta": {"CLASSES": ["cat", "dog", "bird"]}}, ("class 1", "class 2")),
    ],
)
def test_classes_have_the_names_that_a_file_tells(description: dict[str, Any], names: tuple[str, ...]) -> None:
    assert categories(2, description) == dict(enumerate(names, start=1))


def test_the_names_of_coco_keep_their_ids() -> None:
    assert categories(80, {"CLASSES": tuple(COCO_CATEGORIES.values())}) == COCO_CATEGORIES


HAVE_FILES = [
    name
    for name, preset in PRESETS.items()
    if preset.published is not None and preset.config.decoder != "deformable"  # ASAG-D has none
]


@pytest.mark.parametrize("name", HAVE_FILES)
def test_every_published_preset_is_told_from_its_tensors(name: str) -> None:
    preset = find_preset(name)
    config = preset.config
    with torch.device("meta"):
        detector = build_detector(config)
    family, found = identify(_published_of(detector))
    assert family is preset.family
    assert (found.decoder, found.backbone, found.queries, found.dataset) == (
        config.decoder,
        config.backbone,
        config.queries,
        config.dataset,
    )


def _published_of(detector: Detector) -> dict[str, Tensor]:
    """Just the tensors that tell published detectors apart, under their published names."""
    adamixer = detector.config.decoder == "adamixer"
    head = "decoder.bbox_head.0." if adamixer else "decoder.head_series.0."
    state = detector.state_dict()
    found = {
        f"{head}{'fc_cls' if adamixer else 'class_logits'}.weight": state["heads.aux_0.branches.class_logits.weight"],
        "anchor_generator.proj_all.layers.2.weight": state["anchor_generator.fixed_mlp.4.weight"],
    }
    if adamixer:
        found["decoder.bbox_head.0.iof_tau"] = state["heads.aux_0.attention.tau"]
    backbone = {f"backbone.0.body.{n[len('backbone.') :]}": v for n, v in state.items() if n.startswith("backbone.")}
    return found | backbone


class RunsCode:
    """Asks whoever unpickles it to make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class RunsAProcess:
    def __reduce__(self) -> Any:
        return os.system, ("exit 3",)


class Settings(dict[str, Any]):
    """A class that the reader does not know."""


@pytest.mark.parametrize("new_format", [True, False])
def test_nothing_in_a_file_is_run(new_format: bool, tmp_path: Path) -> None:
    """Objects of unknown classes become stand-ins; whatever they ask for does not happen."""
    path, evidence = tmp_path / "hostile.pth", tmp_path / "evidence"
    extras = {"args": RunsCode(evidence), "log": collections.deque([1, 2]), "config": Settings(rate=1.0)}
    more = {Path("out"): argparse.Namespace(lr=2e-4), "scores": np.float64(0.5), "shell": RunsAProcess()}
    content = {"model": {"a": torch.ones(2)}, **extras, **more}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    found = read_foreign(path)
    assert found.tensors["a"].tolist() == [1, 1]
    assert not evidence.exists()


def test_tensors_are_found_wherever_programs_put_them(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0)}
    for content in (state, {"model": state}, {"state_dict": state, "meta": {"epoch": 12}}):
        for new_format in (True, False):
            torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=new_format)
            found = read_foreign(tmp_path / "file.pth")
            assert found.tensors["a"].tolist() == [0, 1, 2]
            assert found.description == content.get("meta", {})
    folder = tmp_path / "folder"
    folder.mkdir()
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
        read_foreign(folder)
    (folder / "config.json").write_text('{"model_type": "x"}')
    assert read_foreign(folder).description == {"model_type": "x"}
    assert read_foreign(folder / "model.safetensors").tensors["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_damaged_file_is_one_line(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.") as caught:
        read_foreign(path)
    assert "\n" not in str(caught.value)


def test_other_content_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"model": {"weight": torch.zeros(2)}}, path)
    with pytest.raises(ValueError, match=r"other\.pth: no published detector.*looked for ASAG: anchor_generator"):
        convert_published(path, tmp_path / "ours.safetensors")
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        read_foreign(path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_foreign(tmp_path / "missing.pth")
    with pytest.raises(FileNotFoundError, match=r"a folder without model\.safetensors"):
        read_foreign(tmp_path)


def test_a_truncated_file_is_told_by_its_missing_tensor() -> None:
    names = "refpoint_embed.weight", "refbbox_embed.weight", "transformer.point_transfer.0.weight"
    state = {name: torch.zeros(2, 2) for name in (*names, "class_embed.0.layers.2.weight")}
    state |= {f"backbone.0.body.layer{stage}.0.conv1.weight": torch.zeros(1) for stage in (1, 2, 3, 4)}
    with pytest.raises(ValueError, match=r"a SAP-DETR without the tensor 'backbone\.0\.body\.conv1\.weight'"):
        identify(state)
