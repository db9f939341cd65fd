"""Running an exported ONNX file with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendUnavailableError, one_line
from runtime.metadata import ModelMetadata
from runtime.postprocessing import OUTPUT_NAMES
from runtime.session import INPUT_NAMES, Session

_REAL = ("boxes", "scores")
_ELEMENT_TYPES = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}


class OnnxRuntimeSession(Session):
    """ONNX Runtime on the CPU or a CUDA GPU; model-local functions of domain ``asag`` are inlined by the runtime.

    ``path`` is the file.
    """

    def __init__(self, path: Path, kind: str = "cpu", device_index: int = 0, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise BackendUnavailableError("ONNX Runtime is not installed: pip install onnxruntime") from None

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors arrive as exceptions; the log would repeat them on the terminal
        # Worker threads that spin on after a run would slow whatever the process does next: the other backends of a
        # comparison, or preparing the next image.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        providers = _providers(onnxruntime, kind, device_index)
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=providers, enable_fallback=0
            )
        except Exception as error:  # the runtime has a family of exception classes without a common public base
            remedy = "export it again with `asag export`" if kind == "cpu" else "try it with the device cpu"
            raise ValueError(f"ONNX Runtime cannot open {path}, {remedy}: {one_line(error)}") from None
        if kind == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise BackendUnavailableError(
                "ONNX Runtime could not start on CUDA; check the NVIDIA driver and CUDA libraries"
            )
        try:
            metadata = ModelMetadata.from_properties(self._session.get_modelmeta().custom_metadata_map)
            max_batch = self._check_contract(metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self.path = path
        super().__init__(
            name=path.name,
            backend=f"onnxruntime-{kind}",
            precision=metadata.precision,
            metadata=metadata,
            versions={"onnxruntime": onnxruntime.__version__},
            max_batch=max_batch,
        )

    def _check_contract(self, metadata: ModelMetadata) -> int | None:
        """Compare inputs and outputs with the model contract; the fixed batch size, or None for a dynamic one."""
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name for value in self._session.get_outputs()}
        if set(inputs) != set(INPUT_NAMES) or not set(OUTPUT_NAMES) <= outputs:
            raise ValueError(
                f"not an asag model: inputs {sorted(inputs)} and outputs {sorted(outputs)} instead of"
                f" {sorted(INPUT_NAMES)} and {sorted(OUTPUT_NAMES)}"
            )
        images = inputs["images"]
        if images.type != _ELEMENT_TYPES[metadata.input_type] or list(images.shape[1:]) != [3, *metadata.input_size]:
            raise ValueError(
                f"input images is {images.type} {images.shape}, but the metadata say {metadata.input_type}"
                f" [batch, 3, {metadata.input_height}, {metadata.input_width}]; export the model again"
            )
        return images.shape[0] if isinstance(images.shape[0], int) else None

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one batch; see :meth:`runtime.session.Session.run`."""
        feeds = {name: np.ascontiguousarray(tensors[name]) for name in INPUT_NAMES}
        try:
            found = self._session.run(list(OUTPUT_NAMES), feeds)
        except Exception as error:  # as when opening
            raise ValueError(f"ONNX Runtime cannot run {self.path} (is it damaged?): {one_line(error)}") from None
        outputs = dict(zip(OUTPUT_NAMES, found, strict=True))
        self._check_outputs(outputs, len(feeds["images"]))
        return outputs

    def _check_outputs(self, outputs: Mapping[str, NDArray], batch: int) -> None:
        """Shapes and types of the outputs: a damaged file may give others."""
        count = outputs["scores"].shape[1] if outputs["scores"].ndim == 2 else -1
        expected = {
            "boxes": (batch, count, 4),
            "scores": (batch, count),
            "labels": (batch, count),
            "overflow": (batch,),
        }
        for name, shape in expected.items():
            if outputs[name].shape != shape or outputs[name].dtype.kind not in ("f" if name in _REAL else "iu"):
                raise ValueError(
                    f"{self.path} gives {name} as {outputs[name].dtype} {list(outputs[name].shape)}, which is no result"
                    " of a detector; export it again with `asag export`"
                )

    def close(self) -> None:
        """Release the model and its memory."""
        self._session = None


def _providers(onnxruntime: Any, kind: str, device_index: int) -> list[Any]:
    if kind == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise BackendUnavailableError("this ONNX Runtime has no CUDA: pip install onnxruntime-gpu in its place")
    cuda = ("CUDAExecutionProvider", {"device_id": device_index, "use_tf32": 0})
    return [cuda, "CPUExecutionProvider"]
