"""The detector that a run starts from: random weights, a checkpoint, or a backbone's weights."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from asag.checkpoint import CheckpointInfo, load_detector
from asag.detector import Detector, build_detector
from asag.presets import find_preset
from train.config import TrainConfig

if TYPE_CHECKING:
    from train.dataset import DetectionDataset

logger = logging.getLogger(__name__)


def starting_detector(config: TrainConfig, dataset: DetectionDataset) -> tuple[Detector, CheckpointInfo]:
    """The preset's detector for the dataset's classes, with the starting weights that `config` names.

    A backbone that does not learn its norms' statistics keeps its stem and first stage frozen (specification
    section 2). Raises what reading the named files raises, and ValueError when they do not fit.
    """
    preset = find_preset(config.preset)
    detector = build_detector(dataclasses.replace(preset.config, num_classes=len(dataset.category_ids)))
    info = CheckpointInfo(
        preset=config.preset,
        category_ids=dataset.category_ids,
        category_names=dataset.category_names,
        shorter_side=preset.shorter_side,
        longer_side=preset.longer_side,
        input_size=preset.input_size,
        patch_capacity=preset.patch_capacity,
    )
    if config.backbone_weights is not None:
        load_backbone(detector, config.backbone_weights)
    if config.initial_weights is not None:
        load_initial_weights(detector, info, config.initial_weights)
    if not detector.config.train_batch_statistics:
        if config.backbone_weights is None and config.initial_weights is None and not config.resume:
            logger.warning(
                "the backbone of %s starts from random weights and its norms stay as they are: name its weights"
                " for a detector that is to be used",
                config.preset,
            )
        detector.backbone.freeze_first_stages()
    return detector, info


def load_initial_weights(detector: Detector, info: CheckpointInfo, path: Path) -> None:
    """Take the weights of a checkpoint of this toolkit, in place.

    A checkpoint of the same classes must fit whole. One of other classes leaves the class layers, whose shape differs,
    at their random start. Raises ValueError when it is of another preset.
    """
    loaded, loaded_info = load_detector(path)
    ours, theirs = detector.state_dict(), loaded.state_dict()
    same_classes = loaded_info.category_ids == info.category_ids
    fitting = {name: value for name, value in theirs.items() if name in ours and ours[name].shape == value.shape}
    differing = sorted(set(ours) - set(fitting))
    allowed = [] if same_classes else [name for name in differing if "class_logits" in name]
    if len(differing) > len(allowed) or set(theirs) - set(ours):
        raise ValueError(f"{path} is of preset {loaded_info.preset} and does not fit {info.preset}: train that preset")
    detector.load_state_dict(fitting, strict=False)
    if not same_classes:
        logger.warning("%s knows other classes: %d tensors of the class layers start anew", path, len(differing))


def load_backbone(detector: Detector, path: Path) -> None:
    """Take a backbone's weights (torchvision's names; a classifier's last layer is ignored), in place.

    The file is a safetensors file or a torch file of tensors only. Raises FileNotFoundError without it, and ValueError
    when it cannot be read or is of another backbone.
    """
    state = {name: value for name, value in _read_tensors(path).items() if not name.startswith("fc.")}
    ours = detector.backbone.state_dict()
    wrong = [name for name, value in state.items() if name not in ours or ours[name].shape != value.shape]
    missing = [name for name in ours if name not in state and not name.endswith("num_batches_tracked")]
    if wrong or missing:
        example = (wrong or missing)[0]
        raise ValueError(
            f"{path} does not hold the weights of {detector.config.backbone}: {len(missing)} tensors are missing and"
            f" {len(wrong)} do not fit, for example {example}"
        )
    detector.backbone.load_state_dict(state, strict=False)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"backbone weights not found: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as tensors: {reason[:120]}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} is not a file of named tensors")
    return content
