"""Fixtures around the toy detector."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from asag.runtime import open_session
from asag.runtime.backends.engine_session import EngineSession
from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.metadata import ModelMetadata
from tests.runtime import cuda_stand_in, engine_stand_in
from tests.runtime.cuda_stand_in import StandInCuda
from tests.runtime.engine_stand_in import StandInMachine
from tests.runtime.toy_detector import build_toy_model, toy_metadata, write_toy_dataset


@pytest.fixture
def metadata() -> ModelMetadata:
    return toy_metadata()


@pytest.fixture
def toy_onnx(tmp_path: Path) -> Path:
    path = tmp_path / "toy.onnx"
    onnx.save(build_toy_model(toy_metadata()), path)
    return path


@pytest.fixture
def toy_dataset(tmp_path: Path) -> CocoFolder:
    return write_toy_dataset(tmp_path / "toy-dataset")


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def machine(
    request: pytest.FixtureRequest, toy_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StandInMachine]:
    """Opens engines on stand-ins for the GPU, closes them, and checks that they left nothing behind."""
    cuda = StandInCuda()
    cuda_stand_in.install(monkeypatch, cuda)
    module = engine_stand_in.install(monkeypatch, cuda, request.param)
    path = engine_stand_in.write_engine(toy_onnx, toy_metadata(), request.param)
    opened: list[EngineSession] = []

    def open_engine(**options: Any) -> EngineSession:
        session = open_session(path, **options)
        assert isinstance(session, EngineSession)
        opened.append(session)
        return session

    yield StandInMachine(request.param, path, toy_onnx, cuda, module, open_engine)
    for session in opened:
        session.close()
    assert cuda.outstanding() == {}
