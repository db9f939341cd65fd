"""A stand-in for TensorRT's runtime: an engine is an ONNX file, and its contexts compute with ONNX Runtime.

It holds its users to TensorRT's rules: a profile and memory before a shape, addresses before running, a run before a
capture, and no change to a context that a graph was captured from.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from asag.runtime.backends.engine_session import EngineSession
from asag.runtime.engines.backend import BACKENDS, EngineBackend
from asag.runtime.engines.manifest import EngineManifest, batch_profiles, manifest_path
from asag.runtime.files import write_json
from asag.runtime.metadata import ModelMetadata
from asag.runtime.postprocessing import OUTPUT_NAMES
from tests.runtime.cuda_stand_in import StandInCuda
from tests.runtime.toy_detector import ToySession

VERSION = "11.4"
TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32"}


class Strategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class GraphStrategy(enum.Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class Severity(enum.Enum):
    ERROR = 1
    INTERNAL_ERROR = 0
    WARNING = 2


class StandInLogger:
    Severity = Severity


class StandInTensorRT:
    """The module. ``engines`` are those that were opened, ``refusals`` how many runs fail next.

    ``uncapturable``: whether running allocates, which no graph can hold.
    """

    __version__ = VERSION
    ILogger = StandInLogger
    ExecutionContextAllocationStrategy = Strategy
    LayerInformationFormat = SimpleNamespace(JSON=0)

    def __init__(self, cuda: StandInCuda, profiles: tuple[tuple[int, int, int], ...], captures_itself: bool) -> None:
        self.cuda = cuda
        self.profiles = profiles
        self.refusals = 0
        self.uncapturable = False
        self.engines: list[StandInEngine] = []
        if captures_itself:
            self.CudaGraphStrategy = GraphStrategy

    @staticmethod
    def nptype(dtype: np.dtype) -> type:
        return dtype.type

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 (TensorRT's name)
        def deserialize(content: bytes) -> StandInEngine | None:
            try:
                self.engines.append(StandInEngine(self, logger, content))
            except onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf:
                logger.log(Severity.ERROR, "this is no engine")
                return None
            return self.engines[-1]

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class StandInEngine:
    """``runs`` are (profile, batch) of every execution in order, replays of graphs included."""

    def __init__(self, module: StandInTensorRT, logger: Any, content: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.tensors = {value.name: value for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.module = module
        self.logger = logger
        self.contexts: list[StandInContext] = []
        self.runs: list[tuple[int, int]] = []
        self.configurations: list[Any] = []

    def get_tensor_shape(self, name: str) -> list[int]:
        return [side if isinstance(side, int) else -1 for side in self.tensors[name].shape]

    def get_tensor_dtype(self, name: str) -> np.dtype:
        return np.dtype(TYPES[self.tensors[name].type])

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1000 * self.module.profiles[profile][2]

    def create_runtime_config(self) -> Any:
        configuration = SimpleNamespace(
            allocation=Strategy.STATIC, cuda_graph_strategy=GraphStrategy.DISABLED, cache=None
        )
        configuration.set_execution_context_allocation_strategy = lambda how: setattr(configuration, "allocation", how)
        configuration.create_runtime_cache = object
        configuration.set_runtime_cache = lambda cache: setattr(configuration, "cache", cache) or True
        self.configurations.append(configuration)
        return configuration

    def create_execution_context(self, how: Any) -> StandInContext:
        assert getattr(how, "allocation", how) is Strategy.USER_MANAGED
        self.contexts.append(StandInContext(self))
        return self.contexts[-1]

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda form: '{"Layers": ["one", "two + three"]}')


class StandInContext:
    def __init__(self, engine: StandInEngine) -> None:
        self.engine = engine
        self.profile = -1
        self.scratch = (0, 0)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.has_run = self.is_captured = False

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert self.scratch[1] >= self.engine.get_device_memory_size_for_profile_v2(profile)
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.is_captured
        smallest, _, largest = self.engine.module.profiles[self.profile]
        fits = smallest <= shape[0] <= largest and list(shape[1:]) == self.engine.get_tensor_shape(name)[1:]
        self.shapes[name] = shape
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert not self.is_captured
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        module, cuda = self.engine.module, self.engine.module.cuda
        capturing = cuda.is_capturing(stream)
        if module.refusals or (capturing and not self.has_run):
            module.refusals = max(0, module.refusals - 1)
            self.engine.logger.log(Severity.ERROR, "refused")
            return False
        if capturing and module.uncapturable:
            cuda.cudaMalloc(1)
        self.is_captured = capturing
        self.has_run = True
        addresses, batch = dict(self.addresses), self.shapes["images"][0]

        def compute() -> None:
            def view(name: str) -> Any:
                shape = (batch, *self.engine.get_tensor_shape(name)[1:])
                return cuda.view(addresses[name], shape, self.engine.get_tensor_dtype(name))

            cuda.view(self.scratch[0], (self.scratch[1],), np.dtype(np.uint8))[...] = 1
            names = [name for name in self.engine.tensors if name not in self.engine.inputs]
            found = self.engine.session.run(names, {name: view(name).copy() for name in self.engine.inputs})
            for name, values in zip(names, found, strict=True):
                view(name)[...] = values
            self.engine.runs.append((self.profile, batch))

        cuda.enqueue(stream, compute)
        return True


def write_engine(
    onnx_path: Path,
    metadata: ModelMetadata,
    backend: str = "tensorrt",
    batch: tuple[int, ...] = (1, 4, 6),
    version: str = VERSION,
    targets: tuple[str, ...] = ("sm_86",),
) -> Path:
    """An "engine" with its manifest beside an ONNX file."""
    path = onnx_path.with_suffix(".engine")
    path.write_bytes(onnx_path.read_bytes())
    manifest = EngineManifest(
        backend=backend,
        version=version,
        precision="fp32",
        profiles=batch_profiles(batch),
        targets=targets,
        tf32=False,
        op_lowering=BACKENDS[backend].op_lowering,
        onnx_name=onnx_path.name,
        onnx_sha256="0" * 64,
        engine_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        layers={},
        layer_types={},
        metadata=metadata,
        plugins={},
        engine_layers=None,
    )
    write_json(manifest_path(path), manifest.to_json())
    return path


def install(
    monkeypatch: pytest.MonkeyPatch, cuda: StandInCuda, backend: str = "tensorrt", batch: tuple[int, ...] = (1, 4, 6)
) -> StandInTensorRT:
    """Let a backend load the stand-in."""
    module = StandInTensorRT(cuda, batch_profiles(batch), captures_itself=backend == "tensorrt-rtx")
    monkeypatch.setattr(EngineBackend, "load", lambda self: module)
    return module


@dataclasses.dataclass
class StandInMachine:
    """A toy engine on stand-ins; ``open`` takes the options of `open_session`."""

    backend: str
    path: Path
    onnx_path: Path
    cuda: StandInCuda
    module: StandInTensorRT
    open: Callable[..., EngineSession]

    @property
    def engine(self) -> StandInEngine:
        """The engine that was opened last."""
        return self.module.engines[-1]


def batch_of(count: int, seed: int = 0) -> dict[str, NDArray]:
    pixels = np.random.default_rng((count, seed)).integers(0, 256, (count, 3, 64, 96), np.uint8)
    return {"images": pixels, "sizes": np.full((count, 2), (64, 96), np.float32)}


def assert_right(found: dict[str, NDArray], tensors: dict[str, NDArray]) -> None:
    expected = ToySession().run(tensors)
    assert set(found) == set(OUTPUT_NAMES)
    for name in OUTPUT_NAMES:
        assert np.allclose(found[name], expected[name], atol=1e-5), name
