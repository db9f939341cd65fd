"""What an exported model says about itself: preset, input, classes and post-processing.

The same record travels as metadata properties of an ONNX file, in the manifest beside an engine, and from the PyTorch
model itself, so that every session prepares images and reads outputs in one way.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

PROPERTY_PREFIX = "asag."


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
    queries: int
    head: str
    levels: str
    precision: str
    input_height: int
    input_width: int
    input_type: str
    shorter_side: int
    longer_side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]
    nms_iou: float | None
    max_detections: int
    patch_capacity: tuple[int, int]
    package_version: str
    weights_digest: str

    def __post_init__(self) -> None:
        for name in ("mean", "std", "category_ids", "category_names", "patch_capacity"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        _check_types(self)
        for name in ("queries", "input_height", "input_width", "shorter_side", "longer_side", "max_detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"model metadata: {name} must be at least 1, it is {getattr(self, name)}")
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
            PROPERTY_PREFIX + field.name: json.dumps(getattr(self, field.name), ensure_ascii=False)
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
        values: dict[str, Any] = {}
        for name in fields:
            try:
                values[name] = json.loads(properties[PROPERTY_PREFIX + name])
            except (ValueError, TypeError, RecursionError):
                raise ValueError(
                    f"asag metadata are damaged at {PROPERTY_PREFIX}{name}; export the model again with `asag export`"
                ) from None
        return cls(**values)


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"model metadata: {name} must be a list, it is {value!r}")
    return tuple(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_types(metadata: ModelMetadata) -> None:
    """Refuse values of a wrong type or length, so that a damaged file is reported where it is read."""
    checks = {
        "str": lambda value: isinstance(value, str),
        "int": _is_integer,
        "float | None": lambda value: value is None or _is_number(value),
        "tuple[float, float, float]": lambda value: len(value) == 3 and all(map(_is_number, value)),
        "tuple[int, int]": lambda value: len(value) == 2 and all(map(_is_integer, value)),
        "tuple[int, ...]": lambda value: len(value) > 0 and all(map(_is_integer, value)),
        "tuple[str, ...]": lambda value: all(isinstance(name, str) for name in value),
    }
    for field in dataclasses.fields(metadata):
        value = getattr(metadata, field.name)
        if not checks[str(field.type)](value):
            raise ValueError(f"model metadata: {field.name} must be {field.type}, it is {value!r}")
