"""What an exported model says about itself: preset, input, classes and post-processing.

The same record travels as metadata properties of an ONNX file, in the manifest beside an engine, and from the PyTorch
model itself, so that every session prepares images and reads outputs in one way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated

import msgspec

from runtime.records import convert_fields

PROPERTY_PREFIX = "asag."

Positive = Annotated[int, msgspec.Meta(ge=1)]


@dataclasses.dataclass(frozen=True)
class ModelMetadata:
    """Description of one deployable detector.

    ``input_height`` and ``input_width`` are the pixels of the fixed, padded input. An image is resized to
    ``shorter_side`` with its longer side at most ``longer_side`` pixels (specification section 1), and shrunk further
    where it would not fit the input. ``input_type`` is ``"uint8"`` (RGB, normalized inside the model) or
    ``"float32"`` (normalized with ``mean`` and ``std``, which apply to values scaled to 0..1). ``nms_iou`` is the
    threshold of class-wise non-maximum suppression after the model, or None for none. ``patch_capacity`` is the number
    of patches per image that the model can explore on (P4, P3).
    """

    preset: str
    decoder: str
    backbone: str
    queries: Positive
    head: str
    levels: str
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
    patch_capacity: tuple[int, int]
    package_version: str
    weights_digest: str

    def __post_init__(self) -> None:
        try:
            convert_fields(self)
        except ValueError as error:
            raise ValueError(f"model metadata: {error}") from None
        if self.input_type not in ("uint8", "float32"):
            raise ValueError(f"model metadata: input_type must be uint8 or float32, it is {self.input_type!r}")
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
        """Read what :meth:`to_properties` wrote; unknown ``asag.`` keys of later versions are ignored.

        Raises ValueError when the properties are not those of an asag model, or damaged.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in fields if PROPERTY_PREFIX + name not in properties]
        if len(missing) == len(fields):
            raise ValueError("not an asag model: it holds no asag metadata; make one with `asag export`")
        if missing:
            raise ValueError(f"asag metadata lack {', '.join(missing)}; export the model again with `asag export`")
        values = {}
        for name in fields:
            try:
                values[name] = msgspec.json.decode(properties[PROPERTY_PREFIX + name])
            except (ValueError, TypeError, RecursionError, msgspec.MsgspecError):
                raise ValueError(
                    f"asag metadata are damaged at {PROPERTY_PREFIX}{name}; export the model again with `asag export`"
                ) from None
        return cls(**values)
