"""An exported file in float32 becomes one of another precision."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from export.precision import convert_precision
from runtime.errors import one_line
from runtime.files import write_bytes
from runtime.metadata import PROPERTY_PREFIX, ModelMetadata


def needs_conversion(model: Path, precision: str) -> bool:
    """Whether the exported file `model` must be converted to be in `precision`, rather than being so already.

    Raises FileNotFoundError for a missing file, and ValueError for one that is damaged, no asag model, or in neither
    this precision nor float32.
    """
    metadata = {item.key: item.value for item in _load(model).metadata_props}
    try:
        found = ModelMetadata.from_properties(metadata).precision
    except ValueError as error:
        raise ValueError(f"{model}: {one_line(error)}") from None
    if found not in (precision, "fp32"):
        raise ValueError(f"{model} is in {found}; only a file in fp32 becomes another precision, so export it in fp32")
    return found != precision


def convert_file(model: Path, output: Path, precision: str) -> None:
    """Write the float32 file `model` to `output` in `precision`, one of :data:`export.precision.PRECISIONS`.

    The metadata of `output` name its precision. Raises what :func:`needs_conversion` raises, and ValueError when a
    weight does not fit.
    """
    needs_conversion(model, precision)
    converted = convert_precision(_load(model), precision)
    for item in converted.metadata_props:
        if item.key == f"{PROPERTY_PREFIX}precision":
            item.value = json.dumps(precision)
    write_bytes(output, converted.SerializeToString())


def _load(model: Path) -> onnx.ModelProto:
    if not model.exists():
        raise FileNotFoundError(f"model not found: {model}")
    try:
        return onnx.load_model(str(model))
    except Exception as error:  # protobuf and onnx raise classes of their own
        raise ValueError(
            f"cannot read {model} as ONNX, export it again with `asag export`: {one_line(error)}"
        ) from None
