"""A model served by Triton Inference Server as a session: the same images in, the same detections out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag.runtime.errors import BackendUnavailableError, one_line
from asag.runtime.metadata import PROPERTY_PREFIX, ModelMetadata
from asag.runtime.postprocessing import OUTPUT_NAMES
from asag.runtime.session import INPUT_NAMES, Session

PROTOCOLS = ("http", "grpc")
_TRITON_TYPES = {"uint8": "UINT8", "float32": "FP32"}


class TritonSession(Session):
    """Requests to a served model, one per batch.

    ``url`` is host:port (the server's defaults are 8000 for HTTP and 8001 for gRPC), ``model`` the served name. What
    the model is comes from its configuration on the server. Raises BackendUnavailableError without the client library
    or a server that answers, and ValueError for a model that `asag serve-repository` did not write.
    """

    def __init__(self, url: str, model: str, protocol: str = "http") -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {protocol!r}: use {' or '.join(PROTOCOLS)}")
        self._library = _import_client(protocol)
        self._model = model
        self._url = url
        try:
            self._client = self._library.InferenceServerClient(url=url)
            configuration = self._configuration(protocol)
        except Exception as error:  # connection errors of either protocol's library, and the server's own
            raise BackendUnavailableError(f"no model {model} at {url} ({protocol}): {one_line(error)}") from None
        properties = {
            key: value["string_value"]
            for key, value in configuration.get("parameters", {}).items()
            if key.startswith(PROPERTY_PREFIX)
        }
        metadata = ModelMetadata.from_properties(properties)
        super().__init__(
            name=model,
            backend=f"triton-{protocol}",
            precision=metadata.precision,
            metadata=metadata,
            versions={"triton backend": str(configuration.get("backend", ""))},
            max_batch=int(configuration.get("max_batch_size", 1)),
        )

    def _configuration(self, protocol: str) -> dict[str, Any]:
        if protocol == "http":
            return dict(self._client.get_model_config(self._model))
        return dict(self._client.get_model_config(self._model, as_json=True)["config"])

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one batch on the server; see :meth:`runtime.session.Session.run`."""
        inputs = []
        for name, kind in zip(INPUT_NAMES, (_TRITON_TYPES[self.metadata.input_type], "FP32"), strict=True):
            tensor = self._library.InferInput(name, list(tensors[name].shape), kind)
            tensor.set_data_from_numpy(np.ascontiguousarray(tensors[name]))
            inputs.append(tensor)
        outputs = [self._library.InferRequestedOutput(name) for name in OUTPUT_NAMES]
        try:
            result = self._client.infer(self._model, inputs, outputs=outputs)
        except Exception as error:  # as when connecting
            raise RuntimeError(f"{self._url} could not run {self._model}: {one_line(error)}") from None
        found = {name: result.as_numpy(name) for name in OUTPUT_NAMES}
        return found | {"overflow": found["overflow"].reshape(-1)}

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _import_client(protocol: str) -> Any:
    try:
        return importlib.import_module(f"tritonclient.{protocol}")
    except ImportError:
        raise BackendUnavailableError(
            f"asking a Triton server needs its client: pip install 'tritonclient[{protocol}]'"
        ) from None
