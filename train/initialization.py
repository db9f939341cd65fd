"""The detector that a run starts from: random weights, a checkpoint, or a backbone's weights."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asag.checkpoint import CheckpointInfo, load_detector
from asag.detector import Detector, build_detector
from asag.families import find_preset
from asag.foreign_files import read_foreign
from asag.runtime.coco_file import name_key
from asag.train.config import TrainConfig

if TYPE_CHECKING:
    from asag.train.dataset import DetectionDataset

logger = logging.getLogger(__name__)


def starting_detector(config: TrainConfig, dataset: DetectionDataset) -> tuple[Detector, CheckpointInfo]:
    """The preset's detector for the dataset's classes, with the starting weights that `config` names.

    Raises what reading the named files raises, and ValueError when they do not fit.
    """
    detector = untrained_detector(config, len(dataset.category_ids))
    categories = dict(zip(dataset.category_ids, dataset.category_names, strict=True))
    info = CheckpointInfo.of(find_preset(config.preset), categories)
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
    """The preset's detector with random weights, the parts of its backbone frozen that the run does not train.

    num_classes: of the dataset; None takes the preset's own.
    """
    chosen = find_preset(config.preset).config
    if num_classes is not None:
        chosen = dataclasses.replace(chosen, num_classes=num_classes)
    if config.learn_norms is not None:
        chosen = dataclasses.replace(chosen, train_batch_statistics=config.learn_norms)
    detector = build_detector(chosen)
    if not chosen.train_batch_statistics:
        detector.backbone.freeze()
    return detector


def load_initial_weights(detector: Detector, info: CheckpointInfo, path: Path) -> None:
    """Take the weights of a checkpoint of this toolkit, in place.

    Class layers are taken over class by class, by name; what the checkpoint has no class for keeps its random start.
    All else must fit. Raises ValueError when it is of another preset.
    """
    loaded, loaded_info = load_detector(path)
    with torch.device("meta"):
        alike = build_detector(dataclasses.replace(detector.config, num_classes=loaded.config.classes))
    if _shapes(loaded) != _shapes(alike):
        raise ValueError(f"{path} is of preset {loaded_info.preset} and does not fit {info.preset}: train that preset")
    theirs = {name_key(name): row for row, name in enumerate(loaded_info.category_names)}
    rows = [theirs.get(name_key(name)) for name in info.category_names]
    state, axes = loaded.state_dict(), _class_axes(loaded)
    for name, axis in axes.items():
        state[name] = _rows_by_class(detector.state_dict()[name], state[name], axis, rows, loaded.config.classes)
    detector.load_state_dict(state)
    known = sum(row is not None for row in rows)
    if known < len(rows) or len(rows) < len(theirs):
        logger.warning(
            "%s has %d of the %d classes; in %d tensors of the class layers the others start anew",
            path,
            known,
            len(rows),
            len(axes),
        )


def _class_axes(detector: Detector) -> dict[str, int]:
    """The tensors that a class more would make longer, and along which axis."""
    with torch.device("meta"):
        longer = _shapes(build_detector(dataclasses.replace(detector.config, num_classes=detector.config.classes + 1)))
    return {
        name: next(axis for axis, (ours, theirs) in enumerate(zip(shape, longer[name], strict=True)) if ours != theirs)
        for name, shape in _shapes(detector).items()
        if shape != longer[name]
    }


def _rows_by_class(start: Tensor, trained: Tensor, axis: int, rows: Sequence[int | None], classes: int) -> Tensor:
    """`start` with the trained row of every class that has one, and those behind the `classes` trained ones."""
    result = start.clone()
    for row, trained_row in enumerate(rows):
        if trained_row is not None:
            result.select(axis, row).copy_(trained.select(axis, trained_row))
    for behind in range(trained.shape[axis] - classes):
        result.select(axis, len(rows) + behind).copy_(trained.select(axis, classes + behind))
    return result


def _shapes(detector: Detector) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in detector.state_dict().items()}


def load_backbone(detector: Detector, path: Path) -> None:
    """Take a backbone's weights, in place.

    The file is what :func:`asag.foreign_files.read_foreign` takes. Names are the backbone's own (for a ResNet
    torchvision's), also behind a prefix as contrastive pretraining writes them (`module.encoder_q.`, `backbone.`,
    `encoder.`, `body.`), or a ResNet's parts by their numbers (SCRL). Classifier layers and everything outside the
    prefix (a momentum encoder, a queue, a neck) are ignored; layers that only a detector's backbone has stay as they
    are. Raises FileNotFoundError without the file, and ValueError when it cannot be read, is of another backbone, or
    holds several.
    """
    tensors = _by_name(read_foreign(path).tensors)
    ours = detector.backbone.state_dict()
    prefix = _backbone_prefix(tensors, list(ours), path)
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    state = {name: value for name, value in state.items() if not _NOT_NEEDED.search(name)}
    problems = {
        "missing": [name for name in ours if name not in state and not _may_be_missing(detector, name)],
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


_NOT_NEEDED = re.compile(
    # Classifiers, with the norm before a Swin's, and what follows from the size of its windows.
    r"^(fc|head|classifier|projector|predictor|norm)\.|\.(attn_mask|relative_position_index)$"
)
_NUMBERED = re.compile(r"^(?P<prefix>encoder\.)(?P<number>[014567])(?P<rest>\..+)$")
_PARTS_OF_RESNET = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_MOMENTUM_COPY = re.compile(r"(?:^|[._])(?:encoder_k|momentum|target|teacher|ema)[._]")


def _may_be_missing(detector: Detector, name: str) -> bool:
    return name.endswith("num_batches_tracked") or name.startswith(detector.backbone.own_layers)


def _by_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a ResNet whose parts a file numbers, in the order in which they compute, by torchvision's names."""
    first = tensors.get("encoder.0.weight")
    if first is None or first.dim() != 4:
        return dict(tensors)
    return {
        _NUMBERED.sub(lambda found: f"{found['prefix']}{_PARTS_OF_RESNET[found['number']]}{found['rest']}", name): value
        for name, value in tensors.items()
    }


def _backbone_prefix(tensors: Mapping[str, Tensor], wanted: Sequence[str], path: Path) -> str:
    """What stands before the backbone's own names; where several copies of it are, before those of the trained one."""
    stem = wanted[0]
    found = {name.removesuffix(stem) for name in tensors if name == stem or name.endswith(f".{stem}")}
    # Other parts may have such a layer as well: the backbone's prefix is one that most of the names follow.
    counts = {prefix: sum(prefix + name in tensors for name in wanted) for prefix in found}
    most = max(counts.values(), default=0)
    fitting = sorted(prefix for prefix, count in counts.items() if count == most)
    trained = [prefix for prefix in fitting if not _MOMENTUM_COPY.search(prefix)] or fitting
    if len(trained) > 1:
        raise ValueError(f"{path} holds several backbones ({', '.join(trained)}): keep one of them in the file")
    return trained[0] if trained else ""
