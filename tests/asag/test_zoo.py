"""Published checkpoint files: what they hold, what they are, and what becomes of them."""

from __future__ import annotations

import argparse
import collections
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from asag.config import DetectorConfig
from asag.presets import PRESETS
from asag.zoo import convert_published, identify, read_published
from torch import Tensor

from asag.checkpoint import load_detector
from asag.detector import Detector, build_detector
from asag.published import translate_name
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
    detector = random_detector(DetectorConfig("sparse_rcnn", "resnet50", 100))
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
    name, found = convert_published(path, tmp_path / "ours.safetensors")
    loaded, info = load_detector(tmp_path / "ours.safetensors")
    assert name == info.preset == "asag-s-r50-3x-100"
    assert found.alternatives == ("asag-s-r50-3x-100",)
    assert loaded.config.head == PRESETS[name].config.head == "aux_2"
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


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.published is not None])
def test_every_published_preset_is_told_from_its_tensors(name: str) -> None:
    config = PRESETS[name].config
    with torch.device("meta"):
        detector = build_detector(config)
    found = identify(_published_of(detector))
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
    def __reduce__(self) -> Any:
        return os.system, ("false",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hostile.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "args": RunsCode()}, path)
    with pytest.raises(ValueError, match="could run code"):
        read_published(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.pth") as caught:
        read_published(path)
    assert "\n" not in str(caught.value)


def test_other_content_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"model": {"weight": torch.zeros(2)}}, path)
    with pytest.raises(ValueError, match="not an ASAG checkpoint"):
        convert_published(path, tmp_path / "ours.safetensors")
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        read_published(path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_published(tmp_path / "missing.pth")
