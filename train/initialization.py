"""The detector that a run starts from: random weights, a checkpoint, or a backbone's weights."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from asag.checkpoint import CheckpointInfo, load_detector
from asag.detector import Detector, build_detector
from asag.presets import find_preset
from asag.zoo import HARMLESS_GLOBALS
from train.config import TrainConfig

if TYPE_CHECKING:
    from train.dataset import DetectionDataset

logger = logging.getLogger(__name__)


def starting_detector(config: TrainConfig, dataset: DetectionDataset) -> tuple[Detector, CheckpointInfo]:
    """The preset's detector for the dataset's classes, with the starting weights that `config` names.

    Raises what reading the named files raises, and ValueError when they do not fit.
    """
    preset = find_preset(config.preset)
    detector = untrained_detector(config, len(dataset.category_ids))
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
    untrained = config.backbone_weights is None and config.initial_weights is None and not config.resume
    if untrained and not detector.config.train_batch_statistics:
        logger.warning(
            "the backbone of %s starts from random weights and its norms stay as they are: name its weights"
            " (--backbone-weights), or let them learn (--set learn_norms=true)",
            config.preset,
        )
    return detector, info


def untrained_detector(config: TrainConfig, num_classes: int | None = None) -> Detector:
    """The preset's detector with random weights, the parts frozen that the run does not train.

    A backbone that does not learn its norms' statistics keeps its stem and first stage frozen (specification
    section 2). num_classes: of the dataset; None takes the preset's own.
    """
    chosen = find_preset(config.preset).config
    if num_classes is not None:
        chosen = dataclasses.replace(chosen, num_classes=num_classes)
    if config.learn_norms is not None:
        chosen = dataclasses.replace(chosen, train_batch_statistics=config.learn_norms)
    detector = build_detector(chosen)
    if not chosen.train_batch_statistics:
        detector.backbone.freeze_first_stages()
    return detector


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
    """Take a backbone's weights, in place.

    The file is a safetensors file or a torch file of tensors and plain values, the tensors perhaps nested under
    ``state_dict`` or ``model``. Names are torchvision's, also behind a prefix as contrastive pretraining writes them
    (``module.encoder_q.``, ``backbone.``, ``encoder.``, ``body.``). Classifier layers and everything outside the prefix
    (a momentum encoder, a queue, a neck) are ignored. Raises FileNotFoundError without the file, and ValueError when
    it cannot be read, is of another backbone, or holds several.
    """
    tensors = _read_tensors(path)
    ours = detector.backbone.state_dict()
    prefix = _backbone_prefix(tensors, set(ours), path)
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    state = {name: value for name, value in state.items() if not name.startswith(_CLASSIFIERS)}
    problems = {
        "missing": [name for name in ours if name not in state and not name.endswith("num_batches_tracked")],
        "left over": [name for name in state if name not in ours],
        "of another shape": [name for name in state if name in ours and ours[name].shape != state[name].shape],
    }
    told = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in problems.items() if names]
    if told:
        behind = f" behind the prefix {prefix!r}" if prefix else ""
        raise ValueError(
            f"{path} does not hold the weights of {detector.config.backbone}{behind}: tensors {', '.join(told)}"
        )
    detector.backbone.load_state_dict(state, strict=False)
    if prefix:
        ignored = sum(not name.startswith(prefix) for name in tensors)
        logger.info("backbone weights: the tensors named %s* of %s; %d others are not used", prefix, path, ignored)


_CLASSIFIERS = ("fc.", "head.", "classifier.", "projector.", "predictor.")
_MOMENTUM_COPY = re.compile(r"(?:^|[._])(?:encoder_k|momentum|target|teacher|ema)[._]")


def _backbone_prefix(tensors: Mapping[str, Tensor], wanted: set[str], path: Path) -> str:
    """What stands before torchvision's names; where several copies of the backbone are, the one that is trained."""
    stem = "conv1.weight"
    found = {name.removesuffix(stem) for name in tensors if name == stem or name.endswith(f".{stem}")}
    # Blocks have a `conv1` as well: the backbone's prefix is one that most of the names follow.
    counts = {prefix: sum(prefix + name in tensors for name in wanted) for prefix in found}
    most = max(counts.values(), default=0)
    fitting = sorted(prefix for prefix, count in counts.items() if count == most)
    trained = [prefix for prefix in fitting if not _MOMENTUM_COPY.search(prefix)] or fitting
    if len(trained) > 1:
        raise ValueError(f"{path} holds several backbones ({', '.join(trained)}): keep one of them in the file")
    return trained[0] if trained else ""


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"backbone weights not found: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(HARMLESS_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as tensors: {reason[:120]}") from None
    for name in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} is not a file of named tensors")
    return dict(content)
