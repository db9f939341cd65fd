"""What a file says of itself beside its graph: some exporters note the classes, and how pixels are normalized.

Facts are of the exporters: Ultralytics and LibreYOLO write ``names``, LightlyTrain ``classes`` and ``image_normalize``,
each as JSON or as Python's literal.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from asag.datasets import COCO_CATEGORIES
from asag.export.adoption.layouts import Triple


@dataclass(frozen=True)
class SelfDescription:
    """``classes`` are category ids and names in the order of the head's columns; ``normalization`` mean and standard
    deviation of pixels in 0..1. None where a file does not say.
    """

    classes: Mapping[int, str] | None = None
    normalization: tuple[Triple, Triple] | None = None


def self_description(proto: onnx.ModelProto) -> SelfDescription:
    """What the metadata of a file tell; what cannot be understood of them is as if it were not there."""
    said = {entry.key: _parsed(entry.value) for entry in proto.metadata_props}
    return SelfDescription(
        _classes(said["names"] if "names" in said else said.get("classes")), _normalization(said.get("image_normalize"))
    )


def _parsed(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _classes(said: Any) -> Mapping[int, str] | None:
    if isinstance(said, list):
        said = dict(enumerate(said))
    if not isinstance(said, dict) or not said:
        return None
    if not all(str(key).isdecimal() and isinstance(name, str) and name for key, name in said.items()):
        return None
    if list(said.values()) == list(COCO_CATEGORIES.values()):
        return COCO_CATEGORIES  # exporters count them; the ids of the data set's files are others
    return {int(key): name for key, name in said.items()}


def _normalization(said: Any) -> tuple[Triple, Triple] | None:
    if not isinstance(said, dict):
        return None
    mean, std = _triple(said.get("mean")), _triple(said.get("std"))
    if mean is None or std is None or min(mean) < 0 or min(std) <= 0 or max(*mean, *std) > 1:
        return None
    return mean, std


def _triple(said: Any) -> Triple | None:
    if not isinstance(said, list | tuple) or len(said) != 3 or not all(isinstance(one, int | float) for one in said):
        return None
    first, second, third = map(float, said)
    return first, second, third
