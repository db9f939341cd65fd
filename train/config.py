"""What a training run is made of, as frozen data, and the recipes of the presets. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEDULES = ("step", "cosine")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")

# Fields that say where and how long a run works, not what it computes: they may differ when a run is resumed.
OPERATIONAL_FIELDS = frozenset(
    {
        "data",
        "train_annotations",
        "train_images",
        "val_annotations",
        "val_images",
        "output",
        "resume",
        "accumulate",
        "workers",
        "device",
        "log_interval",
        "keep_checkpoints",
        "picture_interval",
        "tensorboard",
        "checkpoint_interval",
        "evaluation_interval",
        "evaluation_images",
        "stop_after",
        "time_limit",
    }
)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are the published 1x recipe (specification section 7, Schedule).

    Raises ValueError, naming the field, when a value is out of range.
    """

    preset: str
    """Name of the detector preset."""
    data: Path | None
    """Folder of a dataset in COCO's layout; None where `train_annotations` names a file."""
    output: Path
    """Folder of the run: weights, state, losses and configuration."""
    train_split: str = "train2017"
    val_split: str = "val2017"
    train_annotations: Path | None = None
    """Annotations in COCO's format to train on, instead of the folder's `train_split`."""
    train_images: Path | None = None
    """Folder of their images; None takes the folder of the annotations."""
    val_annotations: Path | None = None
    """Annotations to evaluate on, instead of the folder's `val_split`."""
    val_images: Path | None = None
    """Folder of their images; None takes the folder of the annotations."""
    skip_missing_images: bool = False
    """Leave out images whose file is not there; else one of them stops the run before it begins."""

    epochs: float = 12
    """Passes over the training images."""
    steps: int | None = None
    """Optimizer steps in all; overrides `epochs` when given."""
    first_epoch: int = 0
    """Number that the first epoch counts as. Epoch 0 takes its patches from ground truth; trained weights need 1."""
    batch_size: int = 16
    """Images of one optimizer step, over all processes and pieces."""
    accumulate: int = 1
    """Pieces that a process cuts its images of a step into, for less memory; the gradients stay the same."""

    learning_rate: float = 2e-4
    backbone_learning_rate: float = 2e-5
    weight_decay: float = 1e-4
    gradient_clip: float = 0.1
    """Largest norm of the gradient over all parameters."""
    warmup_steps: int = 500
    warmup_start: float = 1 / 3
    """Share of the learning rate at the first step."""
    schedule: str = "step"
    """`step` multiplies the rate by `decay_factor` after each milestone; `cosine` lets it fall to `final_rate`."""
    milestones: tuple[float, ...] = (8, 11)
    """Epochs after which the rate falls (schedule `step`)."""
    decay_factor: float = 0.1
    final_rate: float = 0.01
    """Share of the learning rate at the last step (schedule `cosine`)."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, which is then what is saved and evaluated."""

    denoising_scale: float | None = None
    """How far noised queries are moved, as a share of the object; None trains without them."""
    denoising_fall: float = 0.0
    """What the scale loses every epoch."""
    precision: str = "auto"
    """What backbone and neck compute in: `float32`, `bfloat16`, `float16` (the loss is then scaled), or `auto` for
    bfloat16 on a GPU (float16 on one that lacks it) and float32 on a CPU. All that follows is float32."""
    compile: bool = False
    """Compile backbone and neck with torch.compile."""
    channels_last: bool | None = None
    """Keep a pixel's channels side by side in memory in backbone and neck; None does so on a GPU."""

    training_shorter_sides: tuple[int, ...] = ()
    """Shorter sides in pixels, one drawn for each image; empty takes the preset's."""
    crop_probability: float = 0.0
    """Chance that an image is first resized to one of `crop_shorter_sides` and cropped at random."""
    crop_shorter_sides: tuple[int, ...] = (400, 500, 600)
    crop_sides: tuple[int, int] = (384, 600)
    """Shortest and longest side of a crop in pixels."""
    flip_probability: float = 0.5
    """Chance of a horizontal flip."""
    seed: int = 0
    initial_weights: Path | None = None
    """A checkpoint of this toolkit to start from."""
    backbone_weights: Path | None = None
    """A backbone's weights (torchvision's or CrossCL's names) to start from."""
    learn_norms: bool | None = None
    """Train the whole backbone and let its norms learn their statistics, as a start from random weights needs; None
    as the preset has it: `asag-a-tiny` does, the published detectors keep those of ImageNet."""

    resume: bool = False
    """Continue the run in `output` from its last checkpoint."""
    workers: int = 2
    """Processes that read images; 0 reads them in the training process."""
    device: str = "auto"
    """A torch device, or `auto` for a GPU where there is one."""
    log_interval: int = 50
    """Steps between two lines of the log and of the table of losses."""
    checkpoint_interval: int = 500
    """Steps between two checkpoints; the last step always gets one."""
    evaluation_interval: int | None = None
    """Steps between two evaluations; 0 never; None after every epoch, in long runs after several: a dozen times at
    most. The last step always gets one."""
    evaluation_images: int | None = None
    """Evaluate on the first images only; None takes all."""
    keep_checkpoints: int = 2
    """How many of the last states are kept to resume from."""
    picture_interval: int = 1000
    """Steps between two pictures of what is detected on a few validation images; the last step gets one; 0 never."""
    tensorboard: bool = True
    """Write events for TensorBoard where it is installed."""
    stop_after: int | None = None
    """End this process after that many steps of the run, with a checkpoint; the schedule still aims at all of them."""
    time_limit: float | None = None
    """End this process when it has trained for that many seconds, with a checkpoint."""

    def __post_init__(self) -> None:
        for name, expected in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, _as_type(name, getattr(self, name), expected))
        _check(self)

    @classmethod
    def for_preset(cls, preset: str, data: str | Path | None, output: str | Path, **overrides: Any) -> TrainConfig:
        """The recipe of a detector preset with some fields replaced; overrides that are None are left out.

        Raises ValueError on a field that does not exist.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ValueError(f"unknown training options: {', '.join(unknown)}")
        values = dict(RECIPES[recipe_name(preset)])
        given = {name: value for name, value in overrides.items() if value is not None}
        if "epochs" in given and "steps" not in given:
            values.pop("steps", None)
        data, output = None if data is None else Path(data), Path(output)
        return cls(preset=preset, data=data, output=output, **{**values, **given})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def computation(self) -> dict[str, Any]:
        """The fields that decide the sequence of weights, for JSON; a resumed run must agree on them."""
        return {name: value for name, value in self.to_dict().items() if name not in OPERATIONAL_FIELDS}


_MULTI_SCALE = {"training_shorter_sides": tuple(range(640, 801, 32)), "crop_probability": 0.5}

# Epochs, milestones and sizes by recipe. `tiny` starts from random weights on few small images: the backbone learns
# as fast as the rest, and steps are as large as the clipped gradients allow.
RECIPES: dict[str, dict[str, Any]] = {
    "dn": {"epochs": 12, "milestones": (8, 11), "denoising_scale": 0.4},
    "1x": {"epochs": 12, "milestones": (8, 11)},
    "3x": {"epochs": 36, "milestones": (24, 33), **_MULTI_SCALE},
    "crowdhuman": {"epochs": 50, "milestones": (40, 46), **_MULTI_SCALE},
    "tiny": {
        "epochs": 24,
        "batch_size": 8,
        # A larger rate or less decay reach a higher AP sooner, but the detector then answers to the last bits of its
        # anchors, and backends agree less (docs/training.md).
        "learning_rate": 6e-4,
        "backbone_learning_rate": 6e-4,
        "weight_decay": 0.05,
        "gradient_clip": 5.0,
        "warmup_steps": 200,
        "schedule": "cosine",
        "milestones": (),
        "ema_decay": 0.998,
        # Reading such images takes a hundredth of a step; another process would only compete for the cores.
        "workers": 0,
    },
}


def recipe_name(preset: str) -> str:
    """The recipe that a detector preset trains with: the one its name carries, else the 1x recipe."""
    parts = preset.split("-")
    return next((name for name in RECIPES if name in parts), "1x")


_POSITIVE = (
    "batch_size",
    "accumulate",
    "log_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "learning_rate",
    "gradient_clip",
    "epochs",
    "steps",
    "evaluation_images",
    "stop_after",
    "time_limit",
    "denoising_scale",
)
_AT_LEAST_ZERO = (
    "backbone_learning_rate",
    "weight_decay",
    "warmup_steps",
    "workers",
    "first_epoch",
    "seed",
    "picture_interval",
    "evaluation_interval",
)
_SHARES = (
    "warmup_start",
    "flip_probability",
    "crop_probability",
    "decay_factor",
    "final_rate",
    "denoising_fall",
)


def _check(config: TrainConfig) -> None:
    """Refuse values that no run can have."""
    for name in _POSITIVE:
        _require(config, name, "above 0", lambda value: value > 0)
    for name in _AT_LEAST_ZERO:
        _require(config, name, "at least 0", lambda value: value >= 0)
    for name in _SHARES:
        _require(config, name, "between 0 and 1", lambda value: 0 <= value <= 1)
    _require(config, "ema_decay", "between 0 and 1", lambda value: 0 < value < 1)
    for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} is {getattr(config, name)!r}; choose one of {', '.join(choices)}")
    if list(config.milestones) != sorted(config.milestones):
        raise ValueError(f"milestones must rise, they are {config.milestones}")
    _check_data(config)
    _check_sides(config)


def _check_data(config: TrainConfig) -> None:
    if config.data is None and config.train_annotations is None:
        raise ValueError("nothing to train on: name a dataset folder (data) or an annotation file (train_annotations)")
    for split in ("train", "val"):
        if getattr(config, f"{split}_images") is not None and getattr(config, f"{split}_annotations") is None:
            raise ValueError(f"{split}_images needs {split}_annotations, the file with their boxes")


def _check_sides(config: TrainConfig) -> None:
    for name in ("training_shorter_sides", "crop_shorter_sides", "crop_sides"):
        if any(side < 32 for side in getattr(config, name)):
            raise ValueError(f"{name} must be at least 32 pixels, they are {getattr(config, name)}")
    if config.crop_sides[0] > config.crop_sides[1] or (config.crop_probability and not config.crop_shorter_sides):
        raise ValueError("crop_sides must be (shortest, longest), and crop_shorter_sides name at least one side")


def _require(config: TrainConfig, name: str, rule: str, holds: Callable[[float], bool]) -> None:
    value = getattr(config, name)
    if value is not None and not (math.isfinite(value) and holds(value)):
        raise ValueError(f"{name} is {value}; it must be {rule}")


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "a text"}


def _as_type(name: str, value: Any, expected: Any) -> Any:
    """A value of a field's type from what JSON, YAML or a caller gives for it. ValueError naming the field."""
    if isinstance(expected, types.UnionType):
        if value is None:
            return None
        expected = next(choice for choice in typing.get_args(expected) if choice is not types.NoneType)
    if typing.get_origin(expected) is tuple:
        inner = typing.get_args(expected)
        if not isinstance(value, list | tuple) or (Ellipsis not in inner and len(value) != len(inner)):
            raise ValueError(f"{name} is {value!r}; it must be a list of numbers")
        return tuple(_as_type(name, entry, inner[0]) for entry in value)
    converted = _convert(value, expected)
    if converted is None:
        raise ValueError(f"{name} is {value!r}; it must be {_KINDS[expected]}")
    return converted


def _convert(value: Any, expected: type) -> Any:
    """The value as a number, truth value, text or path; None when it is no such thing."""
    if expected is Path and isinstance(value, str | Path):
        return Path(value)
    if expected in (bool, str) or isinstance(value, bool):
        return value if type(value) is expected else None
    if expected not in (int, float):
        return None
    try:
        number = float(value)  # YAML reads 2e-4 as a text
    except (TypeError, ValueError):
        return None
    if expected is float:
        return number
    return int(number) if number.is_integer() else None
