"""Fixtures around the toy detector."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from runtime.coco_evaluation import CocoFolder
from runtime.metadata import ModelMetadata
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
