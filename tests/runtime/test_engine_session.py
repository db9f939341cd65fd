"""Which profile a batch runs on, and with which buffers: the session's own logic, against a stand-in for the GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import engine_session
from runtime.engine_backend import EngineBackend
from runtime.engine_manifest import EngineManifest, batch_profiles, manifest_path
from runtime.engine_session import EngineSession
from runtime.files import write_json
from tests.runtime.toy_detector import ToySession, toy_metadata

VERSION = "1.7"
INPUTS = {"images": ((3, 64, 96), np.uint8), "sizes": ((2,), np.float32)}
OUTPUTS = {
    "boxes": ((16, 4), np.float32),
    "scores": ((16,), np.float32),
    "labels": ((16,), np.int64),
    "overflow": ((), np.int32),
}


class StandInDevice:
    """Device memory is a dictionary of arrays; nothing is asynchronous."""

    name, capability, stream = "stand-in", (8, 6), 7

    def __init__(self, index: int) -> None:
        self.memory: dict[int, NDArray] = {}
        self.sizes: dict[int, int] = {}

    def allocate(self, size: int) -> int:
        self.sizes[len(self.sizes) + 1] = size
        return len(self.sizes)

    def copy_in(self, pointer: int, array: NDArray) -> None:
        assert array.nbytes <= self.sizes[pointer]
        self.memory[pointer] = array.copy()

    def copy_out(self, array: NDArray, pointer: int) -> None:
        assert array.nbytes <= self.sizes[pointer]
        array[...] = self.memory[pointer]

    def activate(self) -> None: ...

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


class StandInContext:
    """An execution context that knows the rules: a profile first, shapes inside it, addresses before running."""

    def __init__(self, engine: StandInEngine) -> None:
        self.engine, self.profile, self.batch = engine, -1, 0
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return stream == StandInDevice.stream

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        smallest, _, largest = self.engine.profiles[self.profile]
        assert smallest <= shape[0] <= largest, "the shape is outside the profile"
        self.batch = shape[0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.batch, *(INPUTS | OUTPUTS)[name][0])

    def set_tensor_address(self, name: str, pointer: int) -> None:
        self.addresses[name] = pointer

    def execute_async_v3(self, stream: int) -> bool:
        memory = self.engine.device().memory
        found = ToySession().run({name: memory[self.addresses[name]] for name in INPUTS})
        for name, array in found.items():
            memory[self.addresses[name]] = array
        self.engine.runs.append((self.profile, self.batch))
        return True


class StandInEngine:
    def __init__(self, profiles: tuple[tuple[int, int, int], ...]) -> None:
        self.profiles = profiles
        self.contexts: list[StandInContext] = []
        self.runs: list[tuple[int, int]] = []
        self.session: Any = None

    def device(self) -> StandInDevice:
        return self.session._device

    def create_execution_context(self) -> StandInContext:
        self.contexts.append(StandInContext(self))
        return self.contexts[-1]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(size, *INPUTS[name][0]) for size in self.profiles[profile]]

    def get_tensor_dtype(self, name: str) -> Any:
        return (INPUTS | OUTPUTS)[name][1]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[EngineSession, StandInEngine]:
    path = tmp_path / "toy.engine"
    path.write_bytes(b"engine")
    manifest = EngineManifest(
        backend="tensorrt-rtx",
        version=VERSION,
        precision="fp32",
        profiles=batch_profiles((1, 4, 6)),
        targets=(),
        tf32=False,
        op_lowering="inlined",
        onnx_name="toy.onnx",
        onnx_sha256="0" * 64,
        engine_sha256=hashlib.sha256(b"engine").hexdigest(),
        layers={},
        layer_types={},
        metadata=toy_metadata(),
    )
    write_json(manifest_path(path), manifest.to_json())
    engine = StandInEngine(manifest.profiles)
    module = SimpleNamespace(
        __version__=VERSION,
        nptype=lambda dtype: dtype,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda content: engine),
    )
    monkeypatch.setattr(EngineBackend, "load", lambda self: module)
    monkeypatch.setattr(engine_session, "captured_logger", lambda _: SimpleNamespace(errors=[]))
    monkeypatch.setattr(engine_session, "_Device", StandInDevice)
    session = EngineSession(path)
    engine.session = session
    return session, engine


def batch_of(count: int) -> Mapping[str, NDArray]:
    pixels = np.random.default_rng(count).integers(0, 256, (count, 3, 64, 96), np.uint8)
    return {"images": pixels, "sizes": np.full((count, 2), (64, 96), np.float32)}


def test_each_batch_runs_on_the_profile_for_its_size(opened: tuple[EngineSession, StandInEngine]) -> None:
    session, engine = opened
    assert session.max_batch == 6
    for count in (1, 3, 1, 6, 4, 5, 2):
        tensors = batch_of(count)
        found, expected = session.run(tensors), ToySession().run(tensors)
        assert all(np.array_equal(found[name], expected[name]) for name in OUTPUTS)
    assert engine.runs == [(0, 1), (1, 3), (0, 1), (2, 6), (1, 4), (2, 5), (1, 2)]


def test_contexts_and_buffers_are_made_once(opened: tuple[EngineSession, StandInEngine]) -> None:
    session, engine = opened
    for count in (1, 2, 6, 1, 2, 6):
        session.run(batch_of(count))
    assert sorted(context.profile for context in engine.contexts) == [0, 1, 2]
    assert len(engine.device().sizes) == len(INPUTS) + len(OUTPUTS)
    assert len({tuple(sorted(context.addresses.items())) for context in engine.contexts}) == 1


def test_too_many_images_are_refused(opened: tuple[EngineSession, StandInEngine]) -> None:
    with pytest.raises(ValueError, match="takes 1 to 6 images, not 7"):
        opened[0].run(batch_of(7))
