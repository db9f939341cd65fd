"""Reading an exported file again, checked."""

from __future__ import annotations

from pathlib import Path

import onnx

from asag.runtime.errors import one_line
from asag.runtime.metadata import ModelMetadata
from asag.runtime.onnx_file import read_onnx


def read_exported(path: Path) -> tuple[onnx.ModelProto, ModelMetadata]:
    """The model and its metadata as :func:`runtime.onnx_file.read_onnx` gives them; ValueError if not valid ONNX."""
    proto, metadata = read_onnx(path)
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # the checker has exception classes of its own
        raise ValueError(f"cannot read {path} as ONNX, export it again with `asag export`: {one_line(error)}") from None
    return proto, metadata
