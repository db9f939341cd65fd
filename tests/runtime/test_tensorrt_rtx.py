"""Building engines for real, where TensorRT-RTX installs; running them needs an RTX GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from runtime import open_session
from runtime.errors import BackendUnavailableError
from runtime.parity import Unavailable, open_candidate
from runtime.tensorrt_rtx import BuildResult, build_engine, import_tensorrt_rtx, manifest_path, read_manifest
from tests.runtime.toy_detector import ToySession, build_toy_model, toy_metadata

try:
    TENSORRT_RTX = import_tensorrt_rtx()
except BackendUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def built(toy_onnx: Path) -> BuildResult:
    return build_engine(toy_onnx, toy_onnx.with_suffix(".engine"))


def test_build_writes_engine_and_manifest(toy_onnx: Path) -> None:
    reports: list[tuple[str, float]] = []
    engine = toy_onnx.parent / "out" / "toy.engine"
    result = build_engine(
        toy_onnx, engine, batch=(1, 2, 4), progress=lambda phase, share: reports.append((phase, share))
    )
    assert engine.stat().st_size == result.engine_bytes > 1000
    assert read_manifest(engine) == result.manifest
    assert (result.manifest.profile, result.manifest.precision) == ((1, 2, 4), "fp32")
    assert result.manifest.metadata == toy_metadata()
    assert result.manifest.version == TENSORRT_RTX.__version__
    assert {"inlining functions", "parsing", "built"} <= {phase for phase, _ in reports}
    assert all(0 <= share <= 1 for _, share in reports)
    assert sorted(path.name for path in engine.parent.iterdir()) == ["toy.engine", "toy.engine.json"]


def test_running_says_why_it_cannot_or_runs(built: BuildResult) -> None:
    candidate = open_candidate(built.engine_path)
    if isinstance(candidate, Unavailable):
        assert (candidate.backend, candidate.precision) == ("tensorrt-rtx", "fp32")
        assert "GPU" in candidate.reason
        assert "\n" not in candidate.reason
        return
    images = [np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8) for number in range(6)]
    with candidate:
        for ours, expected in zip(candidate.detect(images, 4), ToySession().detect(images), strict=True):
            assert np.abs(ours.scores - expected.scores).max() < 1e-5


def test_damaged_engine_is_found_without_a_gpu(built: BuildResult) -> None:
    content = bytearray(built.engine_path.read_bytes())
    content[len(content) // 2] ^= 1
    built.engine_path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or is not the engine"):
        open_session(built.engine_path)


def test_damaged_manifests_are_refused(built: BuildResult) -> None:
    path = manifest_path(built.engine_path)
    values = json.loads(path.read_text())
    damaged = ["", "[]", "{", json.dumps(values | {"format": 99}), json.dumps(values | {"profile": [1, "x", 4]})]
    damaged += [json.dumps({name: value for name, value in values.items() if name != left_out}) for left_out in values]
    damaged.append(json.dumps(values | {"metadata": {}}))
    for text in damaged:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"manifest|asag") as caught:
            open_session(built.engine_path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match="has no manifest"):
        open_session(built.engine_path)


@pytest.mark.parametrize(
    ("change", "message"), [({"version": "0.1"}, "built by TensorRT-RTX 0.1"), ({"backend": "x"}, "engine of x")]
)
def test_engine_of_another_version_or_backend(built: BuildResult, change: dict[str, str], message: str) -> None:
    path = manifest_path(built.engine_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"{message}.*build the engine again"):
        open_session(built.engine_path)


def test_inputs_that_cannot_be_built(toy_onnx: Path, tmp_path: Path) -> None:
    engine = tmp_path / "toy.engine"
    with pytest.raises(FileNotFoundError, match="model not found"):
        build_engine(tmp_path / "none.onnx", engine)
    with pytest.raises(ValueError, match=r"suffix \.engine"):
        build_engine(toy_onnx, tmp_path / "toy.plan")
    with pytest.raises(ValueError, match="batch sizes must rise"):
        build_engine(toy_onnx, engine, batch=(1, 4, 2))
    foreign = tmp_path / "foreign.onnx"
    onnx.save(build_toy_model(None), foreign)
    with pytest.raises(ValueError, match=r"foreign.onnx: not an asag model"):
        build_engine(foreign, engine)
    foreign.write_bytes(toy_onnx.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"foreign.onnx"):
        build_engine(foreign, engine)
    onnx.save(build_toy_model(toy_metadata(), batch=2), foreign)
    with pytest.raises(ValueError, match="fixed batch of 2"):
        build_engine(foreign, engine)
    assert build_engine(foreign, engine, batch=(2, 2, 2)).manifest.profile == (2, 2, 2)


def test_the_builders_first_error_is_reported(tmp_path: Path) -> None:
    model = build_toy_model(dataclasses.replace(toy_metadata()))
    # Data-dependent shapes are what the builder does not have.
    model.graph.node.append(helper.make_node("NonZero", ["scores"], ["bright"]))
    model.graph.node.append(helper.make_node("Shape", ["bright"], ["bright_shape"]))
    model.graph.output.append(helper.make_tensor_value_info("bright_shape", onnx.TensorProto.INT64, [2]))
    path = tmp_path / "refused.onnx"
    onnx.save(model, path)
    with pytest.raises(ValueError, match=r"TensorRT-RTX cannot (parse|build) .*refused.onnx: .+") as caught:
        build_engine(path, tmp_path / "refused.engine")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused.engine").exists()
    assert not manifest_path(tmp_path / "refused.engine").exists()


def test_an_op_without_a_body_never_reaches_the_parser(tmp_path: Path) -> None:
    model = build_toy_model(toy_metadata())
    del model.functions[:]
    path = tmp_path / "bare.onnx"
    onnx.save(model, path)
    with pytest.raises(ValueError, match="operators CellScores have no function body"):
        build_engine(path, tmp_path / "bare.engine")
