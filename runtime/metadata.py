"""What an exported model says about itself: family, input, classes, stages and post-processing.

The same record travels as metadata properties of an ONNX file, in the manifest beside an engine, and from the PyTorch
model itself, so that every session prepares images and reads outputs in one way, and nobody asks what kind of detector
it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from asag.family import Stage
from asag.runtime.records import convert_fields
from asag.runtime.schema_1 import upgraded_metadata

PROPERTY_PREFIX = "asag."

SCHEMA = 2
"""Of the record; :mod:`runtime.schema_1` reads the one before."""

FOREIGN = "foreign"
"""The family of a file that another tool exported and `asag adopt` took over: it names no stages."""

RESIZE_MODES = ("fit", "stretch")
INTERPOLATIONS = ("antialias", "bilinear")

Positive = Annotated[int, msgspec.Meta(ge=1)]


@dataclasses.dataclass(frozen=True)
class ModelMetadata:
    """Description of one deployable detector.

    ``choices`` are the fields of the family's configuration that decide no tensor, as they were when the model was
    exported; ``stages`` what its forward pass names, in order; ``half_layers`` parts of the parameters' names of linear
    layers that bear 16 bits. ``input_height`` and ``input_width`` are the pixels of the fixed, padded input. An image
    is resized as ``resize`` says: "fit" to ``shorter_side`` with its longer side at most ``longer_side`` pixels, shrunk
    further where it would not fit the input, or "stretch" to exactly the input. ``interpolation`` is "antialias" (PIL's
    bilinear filter, as wide as it shrinks) or "bilinear" (two taps per axis, whatever the scale). ``input_type`` is
    ``"uint8"`` (RGB, normalized inside the model) or ``"float32"`` (normalized with ``mean`` and ``std``, which are of
    values scaled to 0..1). ``nms_iou`` is the threshold of class-wise non-maximum suppression after the model, or None
    for none.

    Of an adopted file, whose family is :data:`FOREIGN`: ``layout`` is what its inputs and outputs were like,
    ``source_digest`` the SHA-256 of the file that it was made from, ``replaced`` what was replaced in it, {op: count}.
    """

    family: str
    preset: str
    choices: dict[str, Any]
    stages: tuple[Stage, ...]
    half_layers: tuple[str, ...]
    precision: str
    input_height: Positive
    input_width: Positive
    input_type: str
    shorter_side: Positive
    longer_side: Positive
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    category_ids: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]
    category_names: tuple[str, ...]
    nms_iou: float | None
    max_detections: Positive
    package_version: str
    weights_digest: str
    schema: int = SCHEMA
    # Absent from files that were written before there were foreign ones.
    resize: str = "fit"
    interpolation: str = "antialias"
    layout: str = ""
    source_digest: str = ""
    replaced: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            convert_fields(self)
        except ValueError as error:
            raise ValueError(f"model metadata: {error}") from None
        # As JSON would give them back, so that a model and its file compare equal.
        choices = {name: list(value) if isinstance(value, tuple) else value for name, value in self.choices.items()}
        object.__setattr__(self, "choices", choices)
        if self.input_type not in ("uint8", "float32"):
            raise ValueError(f"model metadata: input_type must be uint8 or float32, it is {self.input_type!r}")
        for name, known in (("resize", RESIZE_MODES), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"model metadata: {name} must be {' or '.join(known)}, it is {getattr(self, name)!r}")
        if self.shorter_side > self.longer_side:
            raise ValueError(
                f"model metadata: shorter_side {self.shorter_side} is larger than longer_side {self.longer_side}"
            )
        if any(not math.isfinite(value) or value <= 0 for value in self.std):
            raise ValueError(f"model metadata: std must be positive, it is {self.std}")
        if len(self.category_ids) != len(self.category_names):
            raise ValueError(
                f"model metadata: {len(self.category_ids)} category ids but {len(self.category_names)} category names"
            )
        if len(set(self.category_ids)) != len(self.category_ids):
            raise ValueError("model metadata: category ids repeat")
        if self.nms_iou is not None and not 0 <= self.nms_iou <= 1:
            raise ValueError(f"model metadata: nms_iou must be between 0 and 1, it is {self.nms_iou}")

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the padded input in pixels."""
        return self.input_height, self.input_width

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """What the stages are timed as, in order, with the values that each part ends with."""
        found: dict[str, tuple[str, ...]] = {}
        for stage in self.stages:
            found[stage.timed_as] = (*found.get(stage.timed_as, ()), *stage.value_names())
        return found

    def category_name(self, category_id: int) -> str:
        """Name of a category id, or the id itself as text where the model does not know it."""
        try:
            return self.category_names[self.category_ids.index(category_id)]
        except ValueError:
            return str(category_id)

    def to_properties(self) -> dict[str, str]:
        """Metadata properties of an ONNX file: key ``asag.<field>``, value JSON."""
        return {
            PROPERTY_PREFIX + field.name: msgspec.json.encode(getattr(self, field.name)).decode()
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_properties(cls, properties: Mapping[str, str]) -> ModelMetadata:
        """Read what :meth:`to_properties` wrote, of this schema or the one before; unknown ``asag.`` keys are ignored.

        Raises ValueError when the properties are not those of an asag model, damaged, or of a newer schema.
        """
        values: dict[str, Any] = {}
        for key, text in properties.items():
            # Of a damaged file, protobuf gives bytes for what is no text.
            if isinstance(key, str) and key.startswith(PROPERTY_PREFIX):
                try:
                    values[key.removeprefix(PROPERTY_PREFIX)] = msgspec.json.decode(text)
                except (ValueError, TypeError, RecursionError, msgspec.MsgspecError):
                    raise ValueError(
                        f"asag metadata are damaged at {key}; export the model again with `asag export`"
                    ) from None
        fields = [field.name for field in dataclasses.fields(cls)]
        if not values.keys() & set(fields):
            raise ValueError("not an asag model: it holds no asag metadata; make one with `asag export`")
        schema = values.setdefault("schema", 1)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise ValueError(
                f"asag metadata of schema {schema!r}, written by a newer version (this one reads {SCHEMA}): update asag"
            )
        if schema == 1:
            values = upgraded_metadata(values)
        missing = [name for name in fields if name not in values and name not in _optional(cls)]
        if missing:
            raise ValueError(f"asag metadata lack {', '.join(missing)}; export the model again with `asag export`")
        return cls(**{name: values[name] for name in fields if name in values})


def _optional(kind: type[ModelMetadata]) -> set[str]:
    """Fields with a default, which is what a file without them means."""
    lacking = dataclasses.MISSING
    return {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is not lacking or field.default_factory is not lacking
    }
