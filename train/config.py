"""What a training run is made of, as frozen data, and the recipes of the presets. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from runtime.records import convert_fields, to_json

Positive = Annotated[float, Meta(gt=0)]
PositiveCount = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Side = Annotated[int, Meta(ge=32)]
"""Pixels."""

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

    epochs: Positive = 12
    """Passes over the training images."""
    steps: PositiveCount | None = None
    """Optimizer steps in all; overrides `epochs` when given."""
    first_epoch: Count = 0
    """Number that the first epoch counts as. Epoch 0 takes its patches from ground truth; trained weights need 1."""
    batch_size: PositiveCount = 16
    """Images of one optimizer step, over all processes and pieces."""
    accumulate: PositiveCount = 1
    """Pieces that a process cuts its images of a step into, for less memory; the gradients stay the same."""

    learning_rate: Positive = 2e-4
    backbone_learning_rate: NotNegative = 2e-5
    weight_decay: NotNegative = 1e-4
    gradient_clip: Positive = 0.1
    """Largest norm of the gradient over all parameters."""
    warmup_steps: Count = 500
    warmup_start: Share = 1 / 3
    """Share of the learning rate at the first step."""
    schedule: str = "step"
    """`step` multiplies the rate by `decay_factor` after each milestone; `cosine` lets it fall to `final_rate`."""
    milestones: tuple[float, ...] = (8, 11)
    """Epochs after which the rate falls (schedule `step`)."""
    decay_factor: Share = 0.1
    final_rate: Share = 0.01
    """Share of the learning rate at the last step (schedule `cosine`)."""
    ema_decay: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, which is then what is saved and evaluated."""

    denoising_scale: Positive | None = None
    """How far noised queries are moved, as a share of the object; None trains without them."""
    denoising_fall: Share = 0.0
    """What the scale loses every epoch."""
    precision: str = "auto"
    """What backbone and neck compute in: `float32`, `bfloat16`, `float16` (the loss is then scaled), or `auto` for
    bfloat16 on a GPU (float16 on one that lacks it) and float32 on a CPU. All that follows is float32."""
    compile: bool = False
    """Compile backbone and neck with torch.compile."""
    channels_last: bool | None = None
    """Keep a pixel's channels side by side in memory in backbone and neck; None does so on a GPU."""

    training_shorter_sides: tuple[Side, ...] = ()
    """Shorter sides in pixels, one drawn for each image; empty takes the preset's."""
    crop_probability: Share = 0.0
    """Chance that an image is first resized to one of `crop_shorter_sides` and cropped at random."""
    crop_shorter_sides: tuple[Side, ...] = (400, 500, 600)
    crop_sides: tuple[Side, Side] = (384, 600)
    """Shortest and longest side of a crop in pixels."""
    flip_probability: Share = 0.5
    """Chance of a horizontal flip."""
    seed: Count = 0
    initial_weights: Path | None = None
    """A checkpoint of this toolkit to start from."""
    backbone_weights: Path | None = None
    """A backbone's weights (torchvision's or CrossCL's names) to start from."""
    learn_norms: bool | None = None
    """Train the whole backbone and let its norms learn their statistics, as a start from random weights needs; None
    as the preset has it: `asag-a-tiny` does, the published detectors keep those of ImageNet."""

    resume: bool = False
    """Continue the run in `output` from its last checkpoint."""
    workers: Count = 2
    """Processes that read images; 0 reads them in the training process."""
    device: str = "auto"
    """A torch device, or `auto` for a GPU where there is one."""
    log_interval: PositiveCount = 50
    """Steps between two lines of the log and of the table of losses."""
    checkpoint_interval: PositiveCount = 500
    """Steps between two checkpoints; the last step always gets one."""
    evaluation_interval: Count | None = None
    """Steps between two evaluations; 0 never; None after every epoch, in long runs after several: a dozen times at
    most. The last step always gets one."""
    evaluation_images: PositiveCount | None = None
    """Evaluate on the first images only; None takes all."""
    keep_checkpoints: PositiveCount = 2
    """How many of the last states are kept to resume from."""
    picture_interval: Count = 1000
    """Steps between two pictures of what is detected on a few validation images; the last step gets one; 0 never."""
    tensorboard: bool = True
    """Write events for TensorBoard where it is installed."""
    stop_after: PositiveCount | None = None
    """End this process after that many steps of the run, with a checkpoint; the schedule still aims at all of them."""
    time_limit: Positive | None = None
    """End this process when it has trained for that many seconds, with a checkpoint."""

    def __post_init__(self) -> None:
        convert_fields(self)
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
        """The fields as JSON values."""
        return to_json(self)

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


def _check(config: TrainConfig) -> None:
    """Refuse values that no run can have."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}; it must be finite")
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
    if config.crop_sides[0] > config.crop_sides[1] or (config.crop_probability and not config.crop_shorter_sides):
        raise ValueError("crop_sides must be (shortest, longest), and crop_shorter_sides name at least one side")
