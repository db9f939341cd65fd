"""An exported file in float32 becomes one of another precision."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from asag.export.exported_file import read_exported
from asag.export.precision import convert_precision
from asag.runtime.files import write_bytes
from asag.runtime.onnx_file import write_metadata


def needs_conversion(model: Path, precision: str) -> bool:
    """Whether the exported file `model` must be converted to be in `precision`, rather than being so already.

    Raises FileNotFoundError for a missing file, and ValueError for one that is damaged, no asag model, or in neither
    this precision nor float32.
    """
    return _differs(model, read_exported(model)[1].precision, precision)


def _differs(model: Path, found: str, precision: str) -> bool:
    if found not in (precision, "fp32"):
        raise ValueError(f"{model} is in {found}; only a file in fp32 becomes another precision, so export it in fp32")
    return found != precision


def convert_file(model: Path, output: Path, precision: str) -> None:
    """Write the float32 file `model` to `output` in `precision`, one of :data:`export.precision.PRECISIONS`.

    The metadata of `output` name its precision. Raises what :func:`needs_conversion` raises, and ValueError when a
    weight does not fit.
    """
    proto, metadata = read_exported(model)
    _differs(model, metadata.precision, precision)
    converted = convert_precision(proto, precision, metadata)
    write_metadata(converted, dataclasses.replace(metadata, precision=precision))
    write_bytes(output, converted.SerializeToString())
