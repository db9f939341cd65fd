"""What a family of detectors is to the rest of the toolkit: data, in one value of type :class:`Family`.

A family is one folder under `asag/families`, with a configuration, presets, a detector, its published files and its
training. Everything else (export, precision, runtime, parity, benchmark, report, training loop) takes the value, or
what of it travels in an exported file, and knows no family's name. Imports no PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from asag.detector import Detector
    from asag.published import PublishedFormat
    from asag.training.protocol import Training

Kind = Literal["maps", "boxes", "points", "gaussians", "places", "cells", "queries", "scores", "valid"]
"""What a value is, and so how it is compared and drawn:

- maps: feature maps [B, C, H, W];
- boxes: `cxcywh` [B, N, 4], or [B, N, 5] with a confidence in 0..1;
- points: where each of N queries looks, [B, N, .., 2] (x, y), or [B, N, .., 3] with how coarsely: the binary logarithm
  of a cell's side;
- gaussians: how each of N queries weighs the places of the input, [B, N, .., 4]: the centre (x, y) in pixels, and for
  either axis how many standard deviations a pixel is, of any sign;
- places: [B, N, 2] int64 (x, y), cells of a map; see :attr:`Value.cell`;
- cells: [B, N] int64, cells of all maps of the features, counted row by row, one map after another;
- queries: vectors [B, N, C];
- scores: logits [B, N, classes], compared and drawn after the sigmoid;
- valid: [B, N] bool, which of the stage's rows exist.
"""


@dataclass(frozen=True)
class Value:
    """A value that a stage hands on; called `stage/name` in PyTorch and in the exported file."""

    name: str
    kind: Kind
    frame: Literal["input", "content", "padded"] = "input"
    """Of boxes and points: pixels of the padded input, fractions of the image's content, or fractions of the padded
    input."""
    cell: tuple[int, int] = (1, 1)
    """Of places: pixels of a cell, and cells along each side of what is cut out there."""
    unit: int = 1
    """Of points in the input: pixels that x, y and a cell's side count."""
    exported: bool = True
    """False for what only pictures show: an exported file does not compute it."""


@dataclass(frozen=True)
class Stage:
    """A step of the forward pass that names its values (:func:`asag.detector.stage`)."""

    name: str
    values: tuple[Value, ...]
    part: str = ""
    """What tables of time call the stages that are timed together; the stage's own name where it stands alone."""
    tolerance: float = 1e-5
    """Largest relative difference of an exported file in float32."""
    aligns: bool = False
    """The model chose these rows and their order: rows of both sides are paired by this stage's boxes or places, and
    so are the rows of the stages after it, up to the next that aligns."""

    @property
    def title(self) -> str:
        """The name for a person."""
        return self.name.replace("_", " ")

    @property
    def timed_as(self) -> str:
        """Which part of the network the stage's time belongs to."""
        return self.part or self.name

    def value_names(self) -> tuple[str, ...]:
        """Names of the values that an exported file has."""
        return tuple(f"{self.name}/{value.name}" for value in self.values if value.exported)


@dataclass(frozen=True)
class Choice:
    """A field of the configuration that decides no tensor, so that a checkpoint may be deployed with another value."""

    name: str
    help: str
    values: tuple[Any, ...] = ()
    """What it may be; empty: any value of the field's type."""
    form: str = "VALUE"
    """How a person writes a value that is not one of a list, such as `P4,P3`."""


@dataclass(frozen=True)
class InputSpec:
    """How images are resized, and what a model of fixed input takes unless the exporter is told otherwise; pixels."""

    shorter_side: int = 800
    longer_side: int = 1333
    """Images are resized to this shorter side unless the longer one would pass its limit."""
    size: tuple[int, int] = (800, 1344)
    """Height and width of the exported model's input."""
    divisor: int = 32
    """Both are multiples of this."""
    interpolation: Literal["antialias", "bilinear"] = "antialias"
    """How images are resized, see :func:`runtime.preprocessing.resize`."""


@dataclass(frozen=True)
class Published:
    """What the authors report for a preset, and where."""

    accuracy: str
    """As they give it, such as "AP 42.6"."""
    source: str
    queries: str = ""
    """Average number of queries per image, where the method chooses it."""
    ap: float | None = None
    """Box AP on COCO val2017, 0..100; None for other data."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named configuration with its input, its training and its published accuracy."""

    config: Any
    """The family's frozen dataclass."""
    input: InputSpec = InputSpec()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Settings of training, the loop's and the family's, that differ from the defaults."""
    continued: Mapping[str, Any] = field(default_factory=dict)
    """What the recipe changes where training starts from trained weights of a detector."""
    dataset: str = "coco"
    """A name of :data:`asag.datasets.DATASETS`: whose classes it has and whose measures judge it."""
    published: Published | None = None


class DetectorConfig(Protocol):
    """What the toolkit reads of any family's configuration: a frozen dataclass with these names."""

    @property
    def backbone(self) -> str:
        """Such as "resnet50"."""

    @property
    def num_classes(self) -> int | None:
        """A field: `dataclasses.replace(config, num_classes=n)` makes a detector for other data."""

    @property
    def classes(self) -> int:
        """Number of classes, resolved."""

    @property
    def train_batch_statistics(self) -> bool:
        """A field: whether the backbone's norms learn their running statistics."""

    @property
    def max_detections(self) -> int:
        """Detections of one image at most, before suppression."""

    @property
    def nms_iou(self) -> float | None:
        """IoU threshold of the class-wise suppression after decoding; None where the method has none."""


@dataclass(frozen=True)
class Family:
    """One kind of detector with its own forward pass."""

    name: str
    """In checkpoints and exported files."""
    title: str
    config: type[Any]
    """Frozen dataclass; has what :class:`DetectorConfig` names."""
    settings: type[Any]
    """Frozen dataclass, every field with a default: what only this family's training has."""
    presets: Mapping[str, Preset]
    choices: tuple[Choice, ...]
    half_layers: tuple[str, ...]
    """Linear layers, and convolutions behind the features, that bear 16 bits, by a part of their parameters' names."""
    stages: Callable[[Any], tuple[Stage, ...]]
    """Of a configuration, in order of computation; the first is called "features"."""
    build: Callable[[Any], Detector]
    """Of a configuration: a detector with random weights. This and the next two import PyTorch when called."""
    published: Callable[[], PublishedFormat]
    training: Callable[[Detector, Any], Training]
    """Of a detector and an instance of `settings`."""

    def choices_of(self, config: Any) -> dict[str, Any]:
        """The value of every choice in a configuration."""
        return {choice.name: getattr(config, choice.name) for choice in self.choices}
