from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy

from asag.runtime.engines.build import BuildOptions, build_engine
from asag.runtime.errors import BackendUnavailableError
from asag.runtime.inspection import Inspection, inspect_file
from tests.runtime.toy_detector import build_toy_model


def rows(found: Inspection, title: str) -> dict[Any, tuple[Any, ...]]:
    """Rows of a section by their first value."""
    (section,) = [section for section in found.sections if section.title == title]
    return {row[0]: row[1:] for row in section.rows}


def test_exported_file(toy_onnx: Path) -> None:
    found = inspect_file(toy_onnx)
    assert rows(found, "file")["bytes"] == (toy_onnx.stat().st_size,)
    assert rows(found, "model")["classes"] == ("3: 1 circle, 3 square, 7 ring",)
    assert rows(found, "functions")["asag.CellScores"] == (5, 1)
    operators = rows(found, "operators, functions inlined")
    assert operators["AveragePool"] == (1, "float 1")
    assert operators["Cast"] == (3, "float 1, int64 1, int32 1")
    assert "asag.CellScores" not in operators
    section = next(section for section in found.sections if section.title == "inputs and outputs")
    assert ("input", "images", "uint8", "['batch', 3, 64, 96]") in section.rows
    assert rows(found, "weights")["int64"][0] == 5
    assert rows(found, "largest weights")["cells"][:2] == ("float", "[16, 4]")
    assert found.notes == ()
    json.dumps(found.to_json())


def test_a_file_of_another_kind_is_inspected_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    onnx.save(build_toy_model(None), path)
    found = inspect_file(path)
    assert "not an asag model" in found.notes[0]
    assert rows(found, "operators, functions inlined")["AveragePool"]


def test_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    description = {"config": {"queries": 9, "size": {"width": 8}}, "info": {"preset": "toy"}}
    weights = {"backbone.a": np.zeros((2, 3), np.float32), "backbone.b": np.zeros(4, np.float16), "head.c": np.zeros(7)}
    safetensors.numpy.save_file(weights, path, {"asag": json.dumps(description)})
    found = inspect_file(path)
    assert rows(found, "configuration") == {"queries": (9,), "size.width": (8,)}
    assert rows(found, "checkpoint") == {"preset": ("toy",)}
    section = next(section for section in found.sections if section.title == "parameters")
    assert set(section.rows) == {
        ("backbone", "F32", 1, 6),
        ("backbone", "F16", 1, 4),
        ("head", "F64", 1, 7),
        ("all", "", 3, 17),
    }
    safetensors.numpy.save_file(weights, path, {"asag": "{"})
    assert "no asag description" in inspect_file(path).notes[0]


def test_engine(toy_onnx: Path) -> None:
    try:
        built = build_engine(toy_onnx, toy_onnx.with_suffix(".engine"), BuildOptions(batch=(1, 3)))
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    found = inspect_file(built.engine_path)
    assert rows(found, "file")["TF32"] == ("off",)
    assert rows(found, "file")["asag ops"] == ("inlined",)
    assert rows(found, "profiles") == {1: (1, 1), 2: (3, 3)}
    assert rows(found, "layers before fusion")["pooling"] == (1,)
    assert rows(found, "layers after fusion")
    assert "float" in rows(found, "element types after fusion")
    assert rows(found, "fused layers")
    assert len(rows(found, "intermediate results, as the builder planned them")) == 2
    titles = [section.title for section in found.sections]
    if "memory of a context, on this GPU" not in titles:
        assert len(found.notes) == 1
        assert "where a GPU opens the engine" in found.notes[0]


@pytest.mark.parametrize("name", ["damaged.onnx", "damaged.safetensors", "damaged.engine"])
def test_damaged_files_are_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x00\x01nothing of the kind" * 20)
    with pytest.raises(ValueError, match=name) as caught:
        inspect_file(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="model not found"):
        inspect_file(tmp_path / f"no-{name}")
    with pytest.raises(ValueError, match="unknown kind of model"):
        inspect_file(tmp_path / "model.pt")
