"""From a published checkpoint file to one of ours (specification section 8)."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asag.backbone import BLOCKS_PER_STAGE
from asag.categories import DATASET_CATEGORIES
from asag.checkpoint import CheckpointInfo, save_detector
from asag.config import ANCHOR_BUDGETS, BACKBONES, DetectorConfig
from asag.detector import build_detector
from asag.presets import PRESETS, find_preset
from asag.published import load_published

HARMLESS_GLOBALS: list[Any] = [
    argparse.Namespace,
    collections.Counter,
    collections.defaultdict,
    dict,
    pathlib.PosixPath,
]
"""What published files hold besides tensors and plain values. None of it runs code when it is rebuilt."""


@dataclass(frozen=True)
class PublishedIdentity:
    """What the tensors of a published checkpoint say about it."""

    config: DetectorConfig
    """With the head of the chosen preset."""
    alternatives: tuple[str, ...]
    """All presets with these tensors."""


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a published file, by their published names, read without unrestricted pickle.

    Raises FileNotFoundError, or ValueError with one line, when the file is missing, damaged, or not such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals(HARMLESS_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: no PyTorch file, or one that holds more than tensors and plain values and could run code; "
            "download it again, or save only its 'model' dictionary"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path}: damaged or no PyTorch file ({reason}); download it again") from None
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no dictionary of tensors named 'model'; is it an ASAG checkpoint?")
    return dict(state)


def identify(state: Mapping[str, Tensor]) -> DetectorConfig:
    """Decoder, backbone, queries and dataset of published tensors. Raises ValueError when they are of another model."""
    try:
        decoder = "adamixer" if "decoder.bbox_head.0.iof_tau" in state else "sparse_rcnn"
        class_layer = "fc_cls" if decoder == "adamixer" else "class_logits"
        prefix = "bbox_head" if decoder == "adamixer" else "head_series"
        classes = state[f"decoder.{prefix}.0.{class_layer}.weight"].shape[0]
        first = state["anchor_generator.proj_all.layers.2.weight"].shape[0] // 5
        blocks = len(
            [name for name in state if name.startswith("backbone.0.body.layer3.") and name.endswith(".conv1.weight")]
        )
        bottleneck = "backbone.0.body.layer1.0.conv3.weight" in state
    except KeyError as error:
        raise ValueError(f"not an ASAG checkpoint: it has no tensor {error}") from None
    dataset = "crowdhuman" if classes == 1 else "coco"
    backbones = [name for name in BACKBONES if BLOCKS_PER_STAGE[name][2] == blocks and bottleneck]
    queries = [q for (d, q), budget in ANCHOR_BUDGETS.items() if d == dataset and budget.fixed_anchors == first]
    if not backbones or not queries:
        raise ValueError(f"no published detector has {blocks} blocks in layer3 and {first} anchors per P5 patch")
    return DetectorConfig(decoder, backbones[0], queries[0], dataset=dataset, num_classes=classes)


def convert_published(
    source: str | Path, output: str | Path, preset: str | None = None
) -> tuple[str, PublishedIdentity]:
    """Read a published file, write our checkpoint to `output`; returns the preset's name and what was found.

    preset: which one it is; by default the first with these tensors. Raises ValueError when tensors and preset
    disagree.
    """
    state = read_published(source)
    try:
        config = identify(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    alternatives = tuple(name for name, known in PRESETS.items() if _same_tensors(known.config, config))
    name = preset or (alternatives[0] if alternatives else "custom")
    if preset is not None and preset not in alternatives:
        find_preset(preset)
        fitting = ", ".join(alternatives) or "no preset"
        raise ValueError(f"{source}: the tensors are not those of {preset}; they fit {fitting}")
    known = PRESETS.get(name)
    if known is not None:
        config = dataclasses.replace(config, head=known.config.head)
    detector = build_detector(config)
    try:
        load_published(detector, state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    save_detector(output, detector, _info(name, config))
    return name, PublishedIdentity(config, alternatives)


def _same_tensors(known: DetectorConfig, found: DetectorConfig) -> bool:
    return all(
        getattr(known, field) == getattr(found, field)
        for field in ("decoder", "backbone", "queries", "dataset", "classes", "size")
    )


def _info(preset: str, config: DetectorConfig) -> CheckpointInfo:
    categories = DATASET_CATEGORIES[config.dataset]
    if len(categories) != config.classes:
        categories = {number: f"class {number}" for number in range(1, config.classes + 1)}
    known: Any = PRESETS.get(preset)
    sizes = (
        {}
        if known is None
        else {
            "shorter_side": known.shorter_side,
            "longer_side": known.longer_side,
            "input_size": known.input_size,
            "patch_capacity": known.patch_capacity,
        }
    )
    return CheckpointInfo(preset, tuple(categories), tuple(categories.values()), **sizes)
