"""What a training run is made of, as frozen data. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from asag import families
from asag.families import find_preset
from asag.runtime.records import convert, convert_fields, to_json

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
        "patience",
    }
)


@dataclass(frozen=True)
class TrainConfig:
    """One training run: what every family's has, and in `settings` what only the preset's family has.

    Files, the command line and records know the fields of both by their names alone, so a family's may not be called
    like one of these. Raises ValueError for a preset that does not exist, and, naming the field, for a value out of
    range.
    """

    preset: str
    """Name of the detector preset."""
    data: Path | None
    """A dataset in any layout of :mod:`runtime.layouts`; None where `train_annotations` names a file."""
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
    background_images: bool = False
    """Train on images without any annotation too: nothing that is detected there is right."""
    stored_pixels: bool = False
    """Read pictures as they are stored, whatever their EXIF orientation says, as some annotations were made."""

    epochs: Positive = 12
    """Passes over the training images."""
    steps: PositiveCount | None = None
    """Optimizer steps in all; overrides `epochs` when given."""
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
    as the preset has it."""

    freeze: tuple[str, ...] = ()
    """Parts of the detector that stay as they are, such as `backbone` or `backbone.layer2`."""

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
    patience: PositiveCount | None = None
    """End the run after so many evaluations in a row without a better score; None never does."""
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

    settings: Any = None
    """The family's, an instance of its `settings`; None takes their defaults."""

    def __post_init__(self) -> None:
        convert_fields(self)
        kind = find_preset(self.preset).family.settings
        if self.settings is None:
            object.__setattr__(self, "settings", kind())
        if type(self.settings) is not kind:
            raise ValueError(f"settings are {type(self.settings).__name__}; {self.preset} trains with {kind.__name__}")
        _check(self)

    @classmethod
    def for_preset(cls, preset: str, data: str | Path | None, output: str | Path, **overrides: Any) -> TrainConfig:
        """The recipe of a detector preset with some fields replaced; overrides that are None are left out.

        Raises ValueError on a preset or a field that does not exist.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        found = find_preset(convert(preset, str, "preset"))
        values = {**found.recipe, **(found.continued if "initial_weights" in given else {})}
        if "epochs" in given and "steps" not in given:
            values.pop("steps", None)
        data, output = None if data is None else Path(data), Path(output)
        return cls.of({**values, **given, "preset": preset, "data": data, "output": output})

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Of the fields' values by name, the family's among the others, as :meth:`to_dict` gives them.

        Raises ValueError on a preset or a field that does not exist.
        """
        family = find_preset(convert(values["preset"], str, "preset")).family
        loop, own = _loop_fields(), _names(family.settings)
        unknown = sorted(set(values).difference(loop, own))
        if unknown:
            raise ValueError(f"unknown training options: {', '.join(unknown)}")
        settings = convert({name: value for name, value in values.items() if name in own}, family.settings)
        return cls(**{name: value for name, value in values.items() if name in loop}, settings=settings)

    def replaced(self, **changes: Any) -> TrainConfig:
        """A copy with other values of some fields, the family's among the others."""
        return self.of({**self.fields(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, the family's among the others."""
        return to_json(self.fields())

    def fields(self) -> dict[str, Any]:
        """The values of all fields by name, the family's among the others."""
        loop = {name: getattr(self, name) for name in _loop_fields()}
        return loop | {name: getattr(self.settings, name) for name in _names(type(self.settings))}

    def computation(self) -> dict[str, Any]:
        """The fields that decide the sequence of weights, for JSON; a resumed run must agree on them."""
        return {name: value for name, value in self.to_dict().items() if name not in OPERATIONAL_FIELDS}


def option_names() -> set[str]:
    """Every field that a file or the command line may name: those of all runs, and of every family's settings."""
    return set(_loop_fields()).union(*(_names(family.settings) for family in families.FAMILIES))


def _loop_fields() -> list[str]:
    return [name for name in _names(TrainConfig) if name != "settings"]


def _names(kind: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _check(config: TrainConfig) -> None:
    """Refuse values that no run can have."""
    for name, value in config.fields().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}; it must be finite")
    for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} is {getattr(config, name)!r}; choose one of {', '.join(choices)}")
    if config.patience is not None and config.evaluation_interval == 0:
        raise ValueError("patience counts evaluations, and evaluation_interval 0 makes none")
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
