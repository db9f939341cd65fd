"""Running a TensorRT or TensorRT-RTX engine on an NVIDIA GPU."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from asag.runtime.backends.device_memory import DEFAULT_STREAM, CudaDevice, DeviceArray, check_array, stream_handle
from asag.runtime.backends.engine_execution import ExecutionSlot, LoadedEngine
from asag.runtime.engines.backend import BACKENDS, EngineBackend, captured_logger
from asag.runtime.engines.manifest import REBUILD, EngineManifest, check_target, read_engine
from asag.runtime.errors import BackendUnavailableError
from asag.runtime.postprocessing import OUTPUT_NAMES
from asag.runtime.session import INPUT_NAMES, Pending, Session


class EngineSession(Session):
    """An engine on a GPU, working on up to ``contexts`` batches at once, each with stream, buffers and contexts.

    All memory of the session is allocated when it opens, for the largest batch; execution contexts and CUDA graphs are
    made when a batch size first and second runs. After that a batch costs no allocation on the GPU and no wait but the
    one for its own results. More threads than ``contexts`` wait for one another. Opening checks the file against its
    manifest before anything else, so that a damaged engine is reported as such also on a machine that could not run it.

    Raises BackendUnavailableError without the runtime that built the engine or a GPU that it supports, and ValueError
    for an engine that is damaged, of another version or for another GPU.
    """

    def __init__(self, path: Path, device_index: int = 0, contexts: int = 2) -> None:
        content, self.manifest = read_engine(path)
        backend = BACKENDS[self.manifest.backend]
        module = backend.load()
        _check_version(path, self.manifest, backend, module)
        self._device = CudaDevice(device_index)
        self._engine: LoadedEngine | None = None
        self._slots: list[ExecutionSlot] = []
        self._choosing = threading.Lock()
        try:
            _check_support(backend, self._device)
            check_target(path, self.manifest, self._device.name, self._device.capability)
            super().__init__(
                name=path.name,
                backend=backend.name,
                precision=self.manifest.precision,
                metadata=self.manifest.metadata,
                versions={backend.name: module.__version__, "GPU": self._device.name},
                max_batch=self.manifest.largest_batch,
            )
            self.batches_in_flight = min(contexts, 2)  # enough to overlap; the rest is for other threads
            self._engine = self._load(path, content, backend, module)
            for _ in range(contexts):
                self._slots.append(ExecutionSlot(self._engine, self._device))
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path, content: bytes, backend: EngineBackend, module: Any) -> LoadedEngine:
        logger = captured_logger(module)
        # The runtime must outlive the engine.
        self._runtime = module.Runtime(logger)
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            reason = [*logger.errors, "no reason was given"][0]
            raise ValueError(f"{backend.title} cannot open {path}: {reason}; {REBUILD}")
        return LoadedEngine(module, engine, self.manifest, logger)

    @property
    def graph_failure(self) -> str | None:
        """Why batches are enqueued kernel by kernel, not as CUDA graphs; None where nothing kept them from graphs."""
        return self._opened.graph_failure

    @property
    def _opened(self) -> LoadedEngine:
        if self._engine is None:
            raise ValueError(f"{self.name} is closed; open it again")
        return self._engine

    def _slot(self) -> ExecutionSlot:
        """Of the slots with nothing to fetch the one used last, which has its graphs; else the one started first."""
        with self._choosing:
            slot = next((slot for slot in self._slots if slot.is_free), self._slots[-1])
            self._slots.remove(slot)
            self._slots.insert(0, slot)
            return slot

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one batch on the profile for its size; see :meth:`runtime.session.Session.run`."""
        return self.submit(tensors).result()

    def submit(self, tensors: Mapping[str, NDArray]) -> Pending:
        """Start one batch and return before it is done; see :meth:`runtime.session.Session.submit`."""
        self._check_inputs(tensors)
        return self._slot().start(tensors)

    def run_on_device(
        self, tensors: Mapping[str, Any], outputs: Mapping[str, Any] | None = None, stream: Any = 0
    ) -> dict[str, DeviceArray]:
        """Run one batch between arrays on the GPU; see :meth:`runtime.session.Session.run_on_device`.

        Returns before the batch is done: use the results on ``stream``, or wait for it.
        """
        inputs = {name: DeviceArray.of(name, tensors[name]) for name in INPUT_NAMES}
        batch = self._check_inputs(inputs)
        handle = stream_handle(stream)
        results = self._outputs_on_device(batch, outputs, handle or DEFAULT_STREAM)
        after = {handle, *(array.stream for array in inputs.values() if array.stream is not None)}
        self._slot().start_on_device(inputs, results, after, handle)
        return results

    def _outputs_on_device(self, batch: int, given: Mapping[str, Any] | None, stream: int) -> dict[str, DeviceArray]:
        """Arrays for the results: the caller's own, or memory that belongs to the arrays."""
        self._device.activate()
        results = {}
        for name in OUTPUT_NAMES:
            shape, dtype = self._opened.tensors[name]
            if given is None:
                results[name] = self._device.allocate_array((batch, *shape), dtype, stream)
            else:
                array = DeviceArray.of(name, given[name])
                check_array(name, array, (batch, *shape), dtype)
                results[name] = DeviceArray(array.pointer, array.shape, dtype, stream, array.owner)
        return results

    def _check_inputs(self, tensors: Mapping[str, Any]) -> int:
        """The batch size; ValueError unless shapes and types are those of the engine and a profile takes the batch."""
        specifications = self._opened.tensors
        batch = int(tensors["images"].shape[0])
        self.manifest.profile_for(batch)
        for name in INPUT_NAMES:
            shape, dtype = specifications[name]
            check_array(name, tensors[name], (batch, *shape), dtype)
        return batch

    def layer_information(self) -> list[Any]:
        """What the runtime says of each layer of the engine: names, or objects with types and tactics."""
        self._device.activate()
        module = BACKENDS[self.manifest.backend].load()
        inspector = self._opened.engine.create_engine_inspector()
        information = inspector.get_engine_information(module.LayerInformationFormat.JSON)
        return list(json.loads(information).get("Layers", []))

    def device_memory(self) -> list[int]:
        """Bytes that each profile needs for intermediate results; every slot holds the largest of them."""
        return list(self._opened.memory_of_profiles)

    def close(self) -> None:
        """Wait for what runs, and release the model and its memory. Results that were handed out stay valid."""
        try:
            for slot in self._slots:
                slot.close()
        finally:
            self._slots.clear()
            self._engine = self._runtime = None
            self._device.close()


def _check_version(path: Path, manifest: EngineManifest, backend: EngineBackend, module: Any) -> None:
    if manifest.version != module.__version__:
        raise ValueError(
            f"{path} was built by {backend.title} {manifest.version}, this machine has {module.__version__}; {REBUILD}"
        )


def _check_support(backend: EngineBackend, device: CudaDevice) -> None:
    if device.capability not in backend.capabilities:
        major, minor = device.capability
        known = ", ".join(f"{major}.{minor}" for major, minor in backend.capabilities)
        raise BackendUnavailableError(
            f"{backend.title} engines do not run on {device.name} (compute capability {major}.{minor}); they run on"
            f" {known}"
        )
