"""Looking into an exported model: the values that its stages hand on, as further outputs of a copy of the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag.runtime.errors import BackendUnavailableError, one_line
from asag.runtime.onnx_file import read_onnx
from asag.runtime.postprocessing import OUTPUT_NAMES
from asag.runtime.session import INPUT_NAMES
from asag.runtime.stages.graph import made_by, shown_values


class OnnxStages:
    """The stages of an exported file, run by ONNX Runtime on the CPU.

    Raises BackendUnavailableError where onnx or ONNX Runtime is missing, and ValueError for a file that names no
    stages. Exposing a value may keep the runtime from fusing across it.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendUnavailableError(
                f"looking into stages needs onnx and ONNX Runtime: pip install {error.name}"
            ) from None
        model, metadata = read_onnx(path)
        names = [name for stage in metadata.stages for name in stage.value_names()]
        self._values = shown_values(names, made_by(model.graph.node))
        if not self._values:
            raise ValueError(f"{path} names no stages")
        shown = {value.name for value in model.graph.output}
        for name in self._values.values():
            if name not in shown:
                model.graph.output.add().name = name
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session: Any = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime has a family of exception classes without a common public base
            raise ValueError(f"ONNX Runtime cannot show the stages of {path}: {one_line(error)}") from None

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """The values by their names (`stage/value`), and the model's outputs; floats as float32."""
        wanted = [*OUTPUT_NAMES, *self._values.values()]
        feeds = {name: np.ascontiguousarray(tensors[name]) for name in INPUT_NAMES}
        raw = self._session.run(wanted, feeds)
        named = zip((*OUTPUT_NAMES, *self._values), raw, strict=True)
        return {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in named}
