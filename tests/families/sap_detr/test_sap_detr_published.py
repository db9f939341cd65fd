"""Files of the authors: every tensor has its place, the configuration is read off, oddities are told."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from asag.checkpoint import load_detector
from asag.datasets import COCO_CATEGORIES
from asag.families.sap_detr.config import SAPDETRConfig
from asag.families.sap_detr.detector import SAPDETRDetector
from asag.families.sap_detr.presets import PRESETS
from asag.families.sap_detr.published import PublishedSAPDETR
from asag.published import convert_published, identify
from tests.families.sap_detr.golden_cases import shapes_of

GRID = "refpoint_embed.weight"


def thin(backbone: str) -> dict[str, Tensor]:
    """Tensors without memory of their own; the grid is the published one."""
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes_of(backbone).items()}
    index = np.arange(306)
    grid = np.stack((index % 18 / 18, index // 18 / 17), axis=1).astype(np.float32)
    state[GRID] = torch.from_numpy(np.log(np.maximum(grid, 1e-3) / np.maximum(1 - grid, 1e-3)))
    return state


@pytest.mark.parametrize("preset", [name for name in PRESETS if PRESETS[name].published])
def test_the_configuration_is_read_off_and_every_tensor_has_its_place(goldens: Path, preset: str) -> None:
    state = thin(preset.rpartition("-")[2])
    family, config = identify(state, {"dilation": "dc5" in preset})
    assert family.name == "sap_detr"
    assert config == PRESETS[preset].config
    with torch.device("meta"):
        ours = {name: value.shape for name, value in SAPDETRDetector(config).state_dict().items()}
    found: dict[str, torch.Size] = {}
    for name, value in state.items():
        translated = PublishedSAPDETR().translate(name, value, config)
        assert translated is not None, name
        parts = {target: part.shape for target, part in translated}
        assert not parts.keys() & found, f"{name} has another's place"
        found |= parts
    assert found == {name: shape for name, shape in ours.items() if not name.endswith("num_batches_tracked")}


def test_what_is_no_known_variant_is_said(goldens: Path) -> None:
    state, known = thin("r50"), PublishedSAPDETR()
    assert known.identify({"class_embed.0.layers.2.weight": torch.zeros(91, 256)}, {}) is None
    moved = state[GRID].clone()
    moved[40, 1] += 0.01
    for changes, said in (
        ({GRID: moved}, "refpoint_embed.weight is not the grid of 18 columns and 17 rows"),
        ({GRID: state[GRID][:300]}, "is not the grid"),
        ({"backbone.0.body.layer3.6.conv1.weight": torch.zeros(1)}, "whose backbone is none that is known"),
    ):
        with pytest.raises(ValueError, match=said):
            known.identify(state | changes, {})
    without = {name: value for name, value in state.items() if name != "class_embed.0.layers.2.weight"}
    with pytest.raises(ValueError, match="is the file whole"):
        known.identify(without, {})
    for name in ("optimizer.state", "transformer.unheard", "class_embed.1.scale", "point_embed.0.layers.3.bias"):
        assert known.translate(name, torch.zeros(1), SAPDETRConfig()) is None


def test_a_detector_of_other_classes_keeps_its_rows(goldens: Path) -> None:
    state = thin("r50")
    names = [name for name in state if "class_embed" in name and ".layers.2." in name]
    state |= {name: torch.zeros(5, *state[name].shape[1:]) for name in names}
    _, config = identify(state)
    assert config == dataclasses.replace(PRESETS["sap-detr-r50"].config, num_classes=5)


@pytest.mark.slow
def test_files_become_checkpoints(goldens: Path, tmp_path: Path) -> None:
    """Arguments beside the tensors, or the preset's name, tell the dilation; 91 rows of classes become 80."""
    state = {name: value.clone() for name, value in thin("r50").items()}
    state["class_embed.1.layers.2.bias"] = torch.arange(91.0)
    file, ours = tmp_path / "file.pth", tmp_path / "ours.safetensors"
    torch.save({"model": state, "args": argparse.Namespace(dilation=True), "epoch": 49}, file)
    assert convert_published(file, ours).preset == "sap-detr-dc5-r50"
    detector, info = load_detector(ours)
    assert detector.config == PRESETS["sap-detr-dc5-r50"].config
    assert info.category_ids == tuple(COCO_CATEGORIES)
    bias = detector.state_dict()["class_heads.1.4.bias"]
    assert bias.tolist() == list(COCO_CATEGORIES)
    torch.save({"model": state}, file)
    assert convert_published(file, ours).preset == "sap-detr-r50"
    assert convert_published(file, ours, "sap-detr-dc5-r50").config.dilation
    with pytest.raises(ValueError, match="not those of sap-detr-r101; they fit sap-detr-r50, sap-detr-dc5-r50"):
        convert_published(file, ours, "sap-detr-r101")
    detector, _ = load_detector(ours, {"frame": "content", "dilation": False})
    assert (detector.config.frame, detector.config.dilation) == ("content", False)
