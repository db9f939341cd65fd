"""What a training run is made of, as frozen data, and the recipes of the presets. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEDULES = ("step", "cosine")

# Fields that say where and how long a run works, not what it computes: they may differ when a run is resumed.
OPERATIONAL_FIELDS = frozenset(
    {
        "data",
        "output",
        "resume",
        "workers",
        "device",
        "log_interval",
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
    data: Path
    """Folder of a dataset in COCO's layout."""
    output: Path
    """Folder of the run: weights, state, losses and configuration."""
    train_split: str = "train2017"
    val_split: str = "val2017"

    epochs: float = 12
    """Passes over the training images."""
    steps: int | None = None
    """Optimizer steps in all; overrides `epochs` when given."""
    first_epoch: int = 0
    """Number that the first epoch counts as. Epoch 0 takes its patches from ground truth; trained weights need 1."""
    batch_size: int = 16

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
    mixed_precision: bool = True
    """Run backbone and neck in bfloat16 on a GPU; the CPU always computes in float32."""

    training_shorter_sides: tuple[int, ...] = ()
    """Shorter sides in pixels, one drawn for each image; empty takes the preset's."""
    flip_probability: float = 0.5
    """Chance of a horizontal flip."""
    seed: int = 0
    initial_weights: Path | None = None
    """A checkpoint of this toolkit to start from."""
    backbone_weights: Path | None = None
    """A backbone's weights (torchvision's names) to start from."""

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
    """Steps between two evaluations; None evaluates once, at the end; 0 never."""
    evaluation_images: int | None = None
    """Evaluate on the first images only; None takes all."""
    stop_after: int | None = None
    """End this process after that many steps of the run, with a checkpoint; the schedule still aims at all of them."""
    time_limit: float | None = None
    """End this process when it has trained for that many seconds, with a checkpoint."""

    def __post_init__(self) -> None:
        for name in ("data", "output", "initial_weights", "backbone_weights"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(value))
        for name in ("milestones", "training_shorter_sides"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self)

    @classmethod
    def for_preset(cls, preset: str, data: str | Path, output: str | Path, **overrides: Any) -> TrainConfig:
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
        return cls(preset=preset, data=Path(data), output=Path(output), **{**values, **given})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def computation(self) -> dict[str, Any]:
        """The fields that decide the sequence of weights, for JSON; a resumed run must agree on them."""
        return {name: value for name, value in self.to_dict().items() if name not in OPERATIONAL_FIELDS}


# Epochs, milestones and sizes by recipe. `tiny` starts from random weights on few small images: the backbone learns
# as fast as the rest, and steps are as large as the clipped gradients allow.
RECIPES: dict[str, dict[str, Any]] = {
    "dn": {"epochs": 12, "milestones": (8, 11), "denoising_scale": 0.4},
    "1x": {"epochs": 12, "milestones": (8, 11)},
    "3x": {"epochs": 36, "milestones": (24, 33), "training_shorter_sides": tuple(range(640, 801, 32))},
    "crowdhuman": {"epochs": 50, "milestones": (40, 46), "training_shorter_sides": tuple(range(640, 801, 32))},
    "tiny": {
        "epochs": 24,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "backbone_learning_rate": 1e-3,
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
    positive = ("batch_size", "log_interval", "checkpoint_interval", "learning_rate", "gradient_clip", "epochs")
    at_least_zero = ("backbone_learning_rate", "weight_decay", "warmup_steps", "workers", "first_epoch", "seed")
    optional_positive = ("steps", "evaluation_images", "stop_after", "time_limit")
    shares = ("warmup_start", "flip_probability", "decay_factor", "final_rate", "denoising_fall")
    for name in positive:
        _require(name, getattr(config, name), "above 0", lambda value: value > 0)
    for name in at_least_zero:
        _require(name, getattr(config, name), "at least 0", lambda value: value >= 0)
    for name in optional_positive:
        if getattr(config, name) is not None:
            _require(name, getattr(config, name), "above 0", lambda value: value > 0)
    for name in shares:
        _require(name, getattr(config, name), "between 0 and 1", lambda value: 0 <= value <= 1)
    if config.evaluation_interval is not None:
        _require("evaluation_interval", config.evaluation_interval, "at least 0", lambda value: value >= 0)
    if config.denoising_scale is not None:
        _require("denoising_scale", config.denoising_scale, "above 0", lambda value: value > 0)
    if config.ema_decay is not None:
        _require("ema_decay", config.ema_decay, "between 0 and 1", lambda value: 0 < value < 1)
    if config.schedule not in SCHEDULES:
        raise ValueError(f"schedule is {config.schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if list(config.milestones) != sorted(config.milestones):
        raise ValueError(f"milestones must rise, they are {config.milestones}")
    if any(side < 32 for side in config.training_shorter_sides):
        raise ValueError(f"training_shorter_sides must be at least 32 pixels, they are {config.training_shorter_sides}")


def _require(name: str, value: float, rule: str, holds: Any) -> None:
    if not math.isfinite(value) or not holds(value):
        raise ValueError(f"{name} is {value}; it must be {rule}")
