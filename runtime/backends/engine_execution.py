"""What an engine's batches run on: execution contexts that share memory, a stream, pinned buffers and CUDA graphs."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag.runtime.backends.device_memory import CudaDevice, DeviceArray
from asag.runtime.engines.backend import BACKENDS
from asag.runtime.engines.manifest import REBUILD, EngineManifest
from asag.runtime.postprocessing import OUTPUT_NAMES
from asag.runtime.session import INPUT_NAMES, Pending


class LoadedEngine:
    """An engine that the builder's runtime has opened, with what all its execution contexts have in common.

    ``module`` is TensorRT's or TensorRT-RTX's, ``engine`` what it deserialized, ``logger`` what it writes to.
    ``tensors`` gives the shape of one image's part and the element type of every input and output; ``scratch_bytes``
    the memory that a context needs for intermediate results, whatever the profile. ``captures``: whether to record
    batches as CUDA graphs here; TensorRT-RTX does so itself, since it alone knows when its kernels for a shape are
    compiled. ``graph_failure`` is why that was given up, None while it was not.
    """

    def __init__(self, module: Any, engine: Any, manifest: EngineManifest, logger: Any) -> None:
        self.engine = engine
        self.manifest = manifest
        self.title = BACKENDS[manifest.backend].title
        self.captures = not hasattr(module, "CudaGraphStrategy")
        self.graph_failure: str | None = None
        self._logger = logger
        self.tensors = {name: self._tensor(module, name) for name in (*INPUT_NAMES, *OUTPUT_NAMES)}
        profiles = range(len(manifest.profiles))
        self.memory_of_profiles = [int(engine.get_device_memory_size_for_profile_v2(number)) for number in profiles]
        self.scratch_bytes = max(self.memory_of_profiles)
        strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
        self._configuration = strategy
        if not self.captures:
            configuration = engine.create_runtime_config()
            configuration.set_execution_context_allocation_strategy(strategy)
            configuration.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            # Contexts share the kernels that are compiled on the GPU when a shape first runs.
            configuration.set_runtime_cache(configuration.create_runtime_cache())
            self._configuration = configuration

    def _tensor(self, module: Any, name: str) -> tuple[tuple[int, ...], np.dtype]:
        shape = tuple(self.engine.get_tensor_shape(name))[1:]
        if min(shape, default=0) < 0:
            raise ValueError(f"{self.manifest.onnx_name}: the shape {shape} of {name} depends on the data")
        return shape, np.dtype(module.nptype(self.engine.get_tensor_dtype(name)))

    def create_context(self, batch: int, stream: int, scratch: int) -> Any:
        """A context for batches of one size on one stream, whose intermediate results lie at address ``scratch``."""
        profile = self.manifest.profile_for(batch)
        context = self.engine.create_execution_context(self._configuration)
        if context is not None and self.scratch_bytes:
            context.set_device_memory(scratch, self.scratch_bytes)
        ready = context is not None and context.set_optimization_profile_async(profile, stream)
        if not ready or not all(context.set_input_shape(name, (batch, *self.tensors[name][0])) for name in INPUT_NAMES):
            raise ValueError(f"{self.title} cannot run batches of {batch} images: {self.last_error()}; {REBUILD}")
        return context

    def enqueue(self, context: Any, stream: int) -> None:
        """Put a batch on the stream; RuntimeError where the runtime refuses."""
        if not context.execute_async_v3(stream):
            raise RuntimeError(f"{self.title} could not run a batch: {self.last_error()}")

    def last_error(self) -> str:
        """What the runtime complained of last."""
        return str(self._logger.errors[-1]) if self._logger.errors else "no reason was given"


@dataclasses.dataclass
class _Shape:
    """One batch size on the slot's own buffers: its context, and its graph once there is one."""

    context: Any
    has_run: bool = False
    graph: int | None = None


class ExecutionSlot:
    """Place for one batch at a time: a stream with buffers for the largest batch on the GPU and, pinned, on the host.

    Batches of different slots run beside each other: while one executes, the next is copied in on another slot's
    stream and the one before is copied out. Each batch size has an execution context of its own, because a CUDA graph
    is bound to the state of the context it was captured from; they share one piece of memory for intermediate results,
    as only one of them runs at a time. Threads may call any method; a slot serves them one after another.
    """

    def __init__(self, engine: LoadedEngine, device: CudaDevice) -> None:
        self._engine = engine
        self._device = device
        self._lock = threading.Lock()
        self._stream = device.create_stream()
        self._copied_out = device.create_event()
        self._passed = device.create_event()
        self._scratch = device.allocate(engine.scratch_bytes) if engine.scratch_bytes else 0
        self._buffers: dict[str, int] = {}
        self._host: dict[str, NDArray] = {}
        for name, (shape, dtype) in engine.tensors.items():
            whole = (engine.manifest.largest_batch, *shape)
            self._buffers[name] = device.allocate(int(np.prod(whole)) * dtype.itemsize)
            self._host[name] = device.allocate_pinned(whole, dtype)
        self._shapes: dict[int, _Shape] = {}
        self._foreign: dict[int, Any] = {}
        self._pending: _PendingBatch | None = None

    @property
    def is_free(self) -> bool:
        """Whether no batch's results are left to be fetched."""
        return self._pending is None

    def start(self, tensors: Mapping[str, NDArray]) -> Pending:
        """Copy a batch in, run it and copy the results out, all on the stream; returns at once.

        Where the results of the batch before are not fetched yet, this waits for them and keeps them for whoever asks.
        """
        with self._lock:
            self._device.activate()
            self._fetch()
            batch = len(tensors["images"])
            shape = self._shape(batch)
            for name in INPUT_NAMES:
                host = self._host[name][:batch]
                host[...] = tensors[name]
                self._device.copy_to_device(self._buffers[name], host, self._stream)
            self._run(shape)
            for name in OUTPUT_NAMES:
                self._device.copy_to_host(self._host[name][:batch], self._buffers[name], self._stream)
            self._device.record(self._copied_out, self._stream)
            self._pending = _PendingBatch(self, batch)
            return self._pending

    def _shape(self, batch: int) -> _Shape:
        if batch not in self._shapes:
            context = self._engine.create_context(batch, self._stream, self._scratch)
            for name, address in self._buffers.items():
                context.set_tensor_address(name, address)
            self._shapes[batch] = _Shape(context)
        return self._shapes[batch]

    def _run(self, shape: _Shape) -> None:
        """Put a batch on the stream: as its graph from the second time on, where graphs can be captured."""
        engine = self._engine
        if shape.graph is None and shape.has_run and engine.captures and engine.graph_failure is None:
            try:
                shape.graph = self._device.capture(self._stream, lambda: engine.enqueue(shape.context, self._stream))
            except RuntimeError as error:
                engine.graph_failure = str(error)
        if shape.graph is not None:
            self._device.launch(shape.graph, self._stream)
        else:
            engine.enqueue(shape.context, self._stream)
        shape.has_run = True

    def fetch(self, pending: _PendingBatch) -> None:
        """Wait for the results of a batch, unless they were fetched before."""
        with self._lock:
            if self._pending is pending:
                self._fetch()

    def _fetch(self) -> None:
        """Wait for the batch that runs and hand copies of its results to its owner."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            self._device.wait(self._copied_out)
            pending.outputs = {name: self._host[name][: pending.batch].copy() for name in OUTPUT_NAMES}
        except RuntimeError as error:
            pending.error = error

    def start_on_device(
        self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray], after: Iterable[int], stream: int
    ) -> None:
        """Run a batch between arrays on the GPU; returns at once.

        It starts when what is on the streams ``after`` is done, and ``stream`` goes on when it is done.
        """
        with self._lock:
            self._device.activate()
            batch = inputs["images"].shape[0]
            if batch not in self._foreign:
                self._foreign[batch] = self._engine.create_context(batch, self._stream, self._scratch)
            context = self._foreign[batch]
            for name, array in (*inputs.items(), *outputs.items()):
                context.set_tensor_address(name, array.pointer)
            for before in after:
                self._device.record(self._passed, before)
                self._device.wait_on_stream(self._stream, self._passed)
            self._engine.enqueue(context, self._stream)
            self._device.record(self._passed, self._stream)
            self._device.wait_on_stream(stream, self._passed)

    def close(self) -> None:
        """Wait for what runs and let go of the contexts; the device frees the rest."""
        with self._lock:
            self._fetch()
            try:
                self._device.synchronize(self._stream)
            finally:
                self._shapes.clear()
                self._foreign.clear()


class _PendingBatch(Pending):
    """A batch of ``batch`` images in a slot; the slot sets ``outputs`` or ``error``."""

    def __init__(self, slot: ExecutionSlot, batch: int) -> None:
        self._slot = slot
        self.batch = batch
        self.outputs: dict[str, NDArray] | None = None
        self.error: Exception | None = None

    def result(self) -> dict[str, NDArray]:
        self._slot.fetch(self)
        if self.error is not None:
            raise self.error
        assert self.outputs is not None
        return self.outputs
