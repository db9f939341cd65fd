"""Running an exported ONNX file with ONNX Runtime."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from asag.runtime.backends.device_memory import CudaDevice, DeviceArray, check_array, stream_handle
from asag.runtime.errors import BackendUnavailableError, one_line
from asag.runtime.metadata import ModelMetadata
from asag.runtime.postprocessing import OUTPUT_NAMES
from asag.runtime.session import INPUT_NAMES, Pending, Session

if TYPE_CHECKING:
    from asag.runtime.stages.onnx import OnnxStages

_REAL = ("boxes", "scores")
_ELEMENT_TYPES = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}
# The file's precision in its metadata, which the runtime does not show of a file that it cannot open.
_BFLOAT16 = re.compile(rb'asag\.precision\x12\x06"bf16"')
_NUMPY_TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32"}
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class OnnxRuntimeSession(Session):
    """ONNX Runtime on the CPU, or on a GPU through its CUDA or TensorRT provider.

    ``kind`` is "cpu", "cuda" or "tensorrt". Model-local functions of domain ``asag`` are inlined by the runtime before
    it shares the operators out, so that the TensorRT provider sees standard operators and needs no plugins; operators
    that it does not take run on CUDA. ``path`` is the file. Raises BackendUnavailableError where the provider is
    missing or does not start; another is never taken in its place.
    """

    def __init__(
        self, path: Path, kind: str = "cpu", device_index: int = 0, threads: int | None = None, contexts: int = 1
    ) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise BackendUnavailableError("ONNX Runtime is not installed: pip install onnxruntime") from None

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors arrive as exceptions; the log would repeat them on the terminal
        # Worker threads that spin on after a run would slow whatever the process does next: the other backends of a
        # comparison, or preparing the next image.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._pool: ThreadPoolExecutor | None = None
        if kind == "cpu" and contexts > 1:
            # Batches beside one another keep the cores busier than the threads of one, which wait for the slowest
            # after each operator.
            threads = threads or len(os.sched_getaffinity(0))
            contexts = min(contexts, threads)
            threads //= contexts
            self._pool = ThreadPoolExecutor(contexts, "onnxruntime")
            self.batches_in_flight = contexts + 1  # one waits, so that none of the threads does
        if threads is not None:
            options.intra_op_num_threads = threads
        providers = _providers(onnxruntime, kind, device_index)
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=providers, enable_fallback=0
            )
        except Exception as error:  # the runtime has a family of exception classes without a common public base
            if _BFLOAT16.search(path.read_bytes()):
                raise BackendUnavailableError(
                    f"{path} is bf16, in which this ONNX Runtime has no convolution: build an engine of it with"
                    " `asag build`, or export it with another --precision"
                ) from None
            remedy = "export it again with `asag export`" if kind == "cpu" else "try it with the device cpu"
            raise ValueError(f"ONNX Runtime cannot open {path}, {remedy}: {one_line(error)}") from None
        if kind != "cpu" and _PROVIDERS[kind] not in self._session.get_providers():
            libraries = "NVIDIA driver and CUDA" if kind == "cuda" else "NVIDIA driver, CUDA and TensorRT"
            raise BackendUnavailableError(
                f"ONNX Runtime could not start its {_PROVIDERS[kind]}; check the {libraries} libraries, as ONNX"
                f" Runtime {onnxruntime.__version__} wants them"
            )
        try:
            metadata = ModelMetadata.from_properties(self._session.get_modelmeta().custom_metadata_map)
            max_batch = self._check_contract(metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self.path = path
        self._threads = options.intra_op_num_threads or None
        self._stages: OnnxStages | None = None
        # Where memory lies that is not the host's, in ONNX Runtime's terms.
        self._memory = ("cpu" if kind == "cpu" else "cuda", device_index)
        self._device: CudaDevice | None = None
        super().__init__(
            name=path.name,
            backend=f"onnxruntime-{kind}",
            precision=metadata.precision,
            metadata=metadata,
            versions={"onnxruntime": onnxruntime.__version__},
            max_batch=max_batch,
        )
        self.shows_stages = bool(metadata.stages)

    def stage_values(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """What every stage hands on, on the CPU whatever the session runs on, since a copy of the file shows it; see
        :meth:`runtime.session.Session.stage_values`.
        """
        self.check_stages()
        if self._stages is None:
            from asag.runtime.stages.onnx import OnnxStages

            self._stages = OnnxStages(self.path, self._threads)
        return self._stages.run(tensors)

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
        """Run one batch; see :meth:`runtime.session.Session.run`. One that is smaller than the file's fixed batch is
        filled with copies of its last image.
        """
        batch = len(tensors["images"])
        missing = max(0, (self.max_batch or 0) - batch)
        feeds = {name: np.ascontiguousarray(tensors[name]) for name in INPUT_NAMES}
        if missing:
            feeds = {name: np.concatenate((array, np.repeat(array[-1:], missing, 0))) for name, array in feeds.items()}
        try:
            found = self._session.run(list(OUTPUT_NAMES), feeds)
        except Exception as error:  # as when opening
            raise ValueError(f"ONNX Runtime cannot run {self.path} (is it damaged?): {one_line(error)}") from None
        outputs = dict(zip(OUTPUT_NAMES, found, strict=True))
        self._check_outputs(outputs, len(feeds["images"]))
        return {name: values[:batch] for name, values in outputs.items()}

    def submit(self, tensors: Mapping[str, NDArray]) -> Pending:
        """Start a batch beside others where the session has several contexts; see :class:`runtime.session.Session`."""
        if self._pool is None:
            return super().submit(tensors)
        return _Running(self._pool.submit(self.run, {name: tensors[name].copy() for name in INPUT_NAMES}))

    def run_on_device(
        self, tensors: Mapping[str, Any], outputs: Mapping[str, Any] | None = None, stream: Any = 0
    ) -> dict[str, DeviceArray]:
        """Run one batch between arrays on the GPU; see :meth:`runtime.session.Session.run_on_device`.

        ONNX Runtime works on streams of its own: this waits for ``stream`` first, and returns when the results are
        there. Needs cuda-bindings.
        """
        if self._memory[0] == "cpu":
            return super().run_on_device(tensors, outputs, stream)
        inputs = {name: DeviceArray.of(name, tensors[name]) for name in INPUT_NAMES}
        self._wait_for({stream_handle(stream), *(a.stream for a in inputs.values() if a.stream is not None)})
        return self._run_bound(inputs, outputs)

    def _wait_for(self, streams: Iterable[int]) -> None:
        if self._device is None:
            self._device = CudaDevice(self._memory[1])
        self._device.activate()
        for stream in streams:
            self._device.synchronize(stream)

    def _run_bound(
        self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, Any] | None
    ) -> dict[str, DeviceArray]:
        """Run with inputs and outputs where they lie."""
        binding = self._session.io_binding()
        batch = inputs["images"].shape[0]
        input_type = np.dtype(self.metadata.input_type)
        check_array("images", inputs["images"], (batch, 3, *self.metadata.input_size), input_type)
        check_array("sizes", inputs["sizes"], (batch, 2), np.dtype(np.float32))
        for name, array in inputs.items():
            binding.bind_input(name, *self._memory, array.dtype, array.shape, array.pointer)
        given = {} if outputs is None else {name: DeviceArray.of(name, outputs[name]) for name in OUTPUT_NAMES}
        for name in OUTPUT_NAMES:
            if name in given:
                self._check_output(name, given[name], batch)
                binding.bind_output(name, *self._memory, given[name].dtype, given[name].shape, given[name].pointer)
            else:
                binding.bind_output(name, *self._memory)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as when opening
            raise ValueError(f"ONNX Runtime cannot run {self.path} (is it damaged?): {one_line(error)}") from None
        if given:
            return given
        values = dict(zip(OUTPUT_NAMES, binding.get_outputs(), strict=True))
        return {
            name: DeviceArray(
                value.data_ptr(), tuple(value.shape()), np.dtype(_NUMPY_TYPES[value.data_type()]), owner=value
            )
            for name, value in values.items()
        }

    def _check_output(self, name: str, array: DeviceArray, batch: int) -> None:
        """Raise ValueError unless the model can write its output into the array."""
        declared = next(value for value in self._session.get_outputs() if value.name == name)
        check_array(name, array, (batch, *declared.shape[1:]), np.dtype(_NUMPY_TYPES[declared.type]))

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
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._session = self._stages = None


class _Running(Pending):
    def __init__(self, future: Future[dict[str, NDArray]]) -> None:
        self._future = future

    def result(self) -> dict[str, NDArray]:
        return self._future.result()


def _providers(onnxruntime: Any, kind: str, device_index: int) -> list[Any]:
    if kind == "cpu":
        return ["CPUExecutionProvider"]
    if _PROVIDERS[kind] not in onnxruntime.get_available_providers():
        name = "CUDA" if kind == "cuda" else "TensorRT"
        raise BackendUnavailableError(f"this ONNX Runtime has no {name}: pip install onnxruntime-gpu in its place")
    cuda = (_PROVIDERS["cuda"], {"device_id": device_index, "use_tf32": 0})
    if kind == "cuda":
        return [cuda, "CPUExecutionProvider"]
    # The provider has no option for TF32; TensorRT reads this when it first builds.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    # Precision is decided in the file. Without a cache, engines are built when the session first meets a shape.
    options = {"device_id": device_index, "trt_fp16_enable": False, "trt_engine_cache_enable": False}
    return [(_PROVIDERS["tensorrt"], options), cuda, "CPUExecutionProvider"]
