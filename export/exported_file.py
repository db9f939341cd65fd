"""Reading an exported file again, and saying in it what precision it is in."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from runtime.errors import one_line
from runtime.metadata import PROPERTY_PREFIX, ModelMetadata


def read_exported(path: Path) -> tuple[onnx.ModelProto, ModelMetadata]:
    """The model and its metadata.

    Raises FileNotFoundError for a missing file, and ValueError for one that is damaged or no asag model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model not found: {path}")
    try:
        proto = onnx.load(path)
        onnx.checker.check_model(proto)
    except Exception as error:  # protobuf and onnx raise classes of their own
        raise ValueError(f"cannot read {path} as ONNX, export it again with `asag export`: {one_line(error)}") from None
    try:
        return proto, ModelMetadata.from_properties({entry.key: entry.value for entry in proto.metadata_props})
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def name_precision(proto: onnx.ModelProto, precision: str) -> None:
    """Write another precision into the model's metadata."""
    for entry in proto.metadata_props:
        if entry.key == f"{PROPERTY_PREFIX}precision":
            entry.value = json.dumps(precision)
