"""A model of Triton's Python backend: an engine through this package's session. Copied into a repository as model.py.

The backend's environment needs this package and what runs the engine (`pip install asag[tensorrt-rtx]`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # type: ignore[import-not-found]  # the server provides it

from asag.runtime.opening import open_session
from asag.runtime.session import INPUT_NAMES


class TritonPythonModel:
    """One instance with a session of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model file of this version on the instance's device."""
        folder = Path(args["model_repository"]) / args["model_version"]
        path = next(path for path in sorted(folder.glob("model.*")) if path.suffix in (".engine", ".onnx"))
        on_gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
        # The server runs one batch of an instance at a time; several instances run beside each other.
        self._session = open_session(path, device, contexts=1)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the requests that the server has put together as one batch, and give each its part."""
        parts = [
            {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in INPUT_NAMES}
            for request in requests
        ]
        ends = np.cumsum([len(part["images"]) for part in parts])
        try:
            found = self._session.run({name: np.concatenate([part[name] for part in parts]) for name in INPUT_NAMES})
        except (ValueError, RuntimeError) as error:
            failure = triton.TritonError(str(error))
            return [triton.InferenceResponse(output_tensors=[], error=failure) for _ in requests]
        found["overflow"] = found["overflow"].reshape(-1, 1)
        split = {name: np.split(array, ends[:-1]) for name, array in found.items()}
        return [
            triton.InferenceResponse(
                output_tensors=[triton.Tensor(name, arrays[number]) for name, arrays in split.items()]
            )
            for number in range(len(requests))
        ]

    def finalize(self) -> None:
        """Release the model."""
        self._session.close()
