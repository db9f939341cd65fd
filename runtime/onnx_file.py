"""An exported ONNX file as a graph whose stages have their names, with its metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asag.runtime.errors import BackendUnavailableError, one_line
from asag.runtime.metadata import PROPERTY_PREFIX, ModelMetadata
from asag.runtime.schema_1 import name_values


def read_onnx(path: str | Path) -> tuple[Any, ModelMetadata]:
    """The model (`onnx.ModelProto`) and its metadata; one of schema 1 gets the names that its stages would have today.

    Raises FileNotFoundError for a missing file, ValueError for one that is damaged or no asag model, and
    BackendUnavailableError without the onnx package.
    """
    path = Path(path)
    try:
        import onnx
    except ImportError:
        raise BackendUnavailableError("looking into an exported file needs onnx: pip install onnx") from None
    if not path.is_file():
        raise FileNotFoundError(f"model not found: {path}")
    try:
        proto = onnx.load(path)
    except Exception as error:  # protobuf and onnx raise classes of their own
        raise ValueError(f"cannot read {path} as ONNX, export it again with `asag export`: {one_line(error)}") from None
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        metadata = ModelMetadata.from_properties(properties)
        if f"{PROPERTY_PREFIX}schema" not in properties:
            name_values(proto.graph)
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    return proto, metadata


def write_metadata(proto: Any, metadata: ModelMetadata) -> None:
    """Put the metadata into a model, in place of those it has."""
    kept = [entry for entry in proto.metadata_props if not entry.key.startswith(PROPERTY_PREFIX)]
    kept = [(entry.key, entry.value) for entry in kept]
    del proto.metadata_props[:]
    for key, value in (*kept, *metadata.to_properties().items()):
        proto.metadata_props.add(key=key, value=value)
