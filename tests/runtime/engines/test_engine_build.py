"""Building engines for real, where TensorRT-RTX installs; running them needs an RTX GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from asag.runtime import open_session
from asag.runtime.engines.backend import TENSORRT, TENSORRT_RTX, EngineBackend
from asag.runtime.engines.build import BuildOptions, BuildResult, build_engine
from asag.runtime.engines.manifest import batch_profiles, check_target, manifest_path, read_manifest
from asag.runtime.errors import BackendUnavailableError
from asag.runtime.parity.comparison import Unavailable, open_candidate
from tests.runtime.toy_detector import ToySession, build_toy_model, toy_metadata

try:
    tensorrt_rtx = TENSORRT_RTX.load()
except BackendUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    path = tmp_path_factory.mktemp("engine") / "toy.onnx"
    onnx.save(build_toy_model(toy_metadata()), path)
    return build_engine(path, path.with_suffix(".engine"))


@pytest.fixture
def built(toy_onnx: Path) -> BuildResult:
    return build_engine(toy_onnx, toy_onnx.with_suffix(".engine"))


def test_build_writes_engine_and_manifest(toy_onnx: Path) -> None:
    reports: list[tuple[str, float]] = []
    engine = toy_onnx.parent / "out" / "toy.engine"
    options = BuildOptions(batch=(1, 2, 5))
    result = build_engine(toy_onnx, engine, options, lambda phase, share: reports.append((phase, share)))
    assert engine.stat().st_size == result.engine_bytes > 1000
    assert read_manifest(engine) == result.manifest
    assert result.manifest.profiles == ((1, 1, 1), (2, 2, 2), (3, 5, 5))
    assert (result.manifest.precision, result.manifest.tf32, result.manifest.op_lowering) == ("fp32", False, "inlined")
    assert result.manifest.onnx_sha256 == hashlib.sha256(toy_onnx.read_bytes()).hexdigest()
    assert result.manifest.layers["pooling"] == 1
    assert result.manifest.layer_types["float"] > 3
    assert result.manifest.metadata == toy_metadata()
    assert result.manifest.version == tensorrt_rtx.__version__
    assert {"reading", "parsing", "built"} <= {phase for phase, _ in reports}
    assert all(0 <= share <= 1 for _, share in reports)
    assert sorted(path.name for path in engine.parent.iterdir()) == ["toy.engine", "toy.engine.json"]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((1,), [(1, 1, 1)]), ((4,), [(1, 4, 4)]), ((1, 4, 16), [(1, 1, 1), (2, 4, 4), (5, 16, 16)])],
)
def test_one_profile_per_batch_size(sizes: tuple[int, ...], expected: list[tuple[int, int, int]]) -> None:
    assert batch_profiles(sizes) == tuple(expected)


@pytest.mark.parametrize("sizes", [(), (0, 1), (1, 1, 4), (4, 1)])
def test_batch_sizes_must_rise(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must rise from at least 1"):
        batch_profiles(sizes)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5, unique=True).map(sorted), st.integers(1, 64))
def test_a_batch_runs_on_the_profile_of_the_next_size(built_once: BuildResult, sizes: list[int], batch: int) -> None:
    manifest = dataclasses.replace(built_once.manifest, profiles=batch_profiles(sizes))
    if batch > sizes[-1]:
        with pytest.raises(ValueError, match=f"takes 1 to {sizes[-1]} images, not {batch}"):
            manifest.profile_for(batch)
    else:
        assert sizes[manifest.profile_for(batch)] == min(size for size in sizes if size >= batch)


def test_targets_and_log(toy_onnx: Path, tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    options = BuildOptions(batch=(1,), targets=("sm_86", "sm_89"))
    result = build_engine(toy_onnx, tmp_path / "ada.engine", options, log_path=log)
    assert read_manifest(result.engine_path).targets == ("sm_86", "sm_89")
    assert len(log.read_text().splitlines()) > 20
    assert "warning: " in log.read_text()


def test_tf32_and_workspace(toy_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []
    genuine = tensorrt_rtx.Builder.create_builder_config
    monkeypatch.setattr(
        tensorrt_rtx.Builder, "create_builder_config", lambda self: configs.append(genuine(self)) or configs[-1]
    )
    plain = build_engine(toy_onnx, tmp_path / "plain.engine", BuildOptions(batch=(1,)))
    other = build_engine(toy_onnx, tmp_path / "other.engine", BuildOptions(batch=(1,), tf32=True, workspace_mib=96))
    assert (plain.manifest.tf32, other.manifest.tf32) == (False, True)
    assert [config.get_flag(tensorrt_rtx.BuilderFlag.TF32) for config in configs] == [False, True]
    pool = tensorrt_rtx.MemoryPoolType.WORKSPACE
    assert configs[1].get_memory_pool_limit(pool) == 96 << 20 != configs[0].get_memory_pool_limit(pool)


def test_the_manifest_names_the_users_file_of_a_converted_one(toy_onnx: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted.onnx"
    onnx.save(build_toy_model(toy_metadata(precision="fp16")), converted)
    manifest = build_engine(converted, tmp_path / "toy.engine", BuildOptions(batch=(1,)), source=toy_onnx).manifest
    assert (manifest.onnx_name, manifest.precision) == ("toy.onnx", "fp16")
    assert manifest.onnx_sha256 == hashlib.sha256(toy_onnx.read_bytes()).hexdigest()


def test_the_manifest_tells_what_was_fused(tmp_path: Path) -> None:
    """The builder lists its layers in messages; a release that words them otherwise would show here."""
    model = build_toy_model(toy_metadata())
    for node in [*model.graph.node, *model.functions[0].node]:
        node.name = f"node_{node.output[0]}"
    onnx.save(model, tmp_path / "named.onnx")
    built = build_engine(tmp_path / "named.onnx", tmp_path / "named.engine")
    layers = built.manifest.engine_layers
    assert layers is not None
    assert sum(layers.kernels.values()) > 0
    assert sum(layers.kernels.values()) >= sum(layers.types.values()) > 0
    assert any("Unsqueeze" in operators.split(" + ") for _, operators, _ in layers.fused), layers.fused
    assert len(layers.activation_bytes) == len(built.manifest.profiles)


@pytest.fixture
def local_backend(monkeypatch: pytest.MonkeyPatch) -> EngineBackend:
    """TensorRT's rules with TensorRT-RTX's module, whose builder runs anywhere, on a machine with an sm_86 GPU."""
    monkeypatch.setattr("asag.trt_plugins.launch.current_capability", lambda: 86)
    return dataclasses.replace(TENSORRT, module=TENSORRT_RTX.module)


def test_a_backend_for_the_gpu_at_hand(local_backend: EngineBackend, toy_onnx: Path, tmp_path: Path) -> None:
    options = BuildOptions(local_backend, (1,))
    assert options.lowering == "plugins"
    # The toy's op has no plugin.
    result = build_engine(toy_onnx, tmp_path / "toy.engine", options)
    assert (result.manifest.backend, result.manifest.targets) == ("tensorrt", ("sm_86",))
    check_target(result.engine_path, result.manifest, "GPU", (8, 6))
    with pytest.raises(ValueError, match=r"built for sm_86, and GPU is sm_89; .*--backend tensorrt --target sm_89"):
        check_target(result.engine_path, result.manifest, "GPU", (8, 9))
    same = dataclasses.replace(options, targets=("sm_86",), op_lowering="inlined")
    assert build_engine(toy_onnx, tmp_path / "same.engine", same).manifest.op_lowering == "inlined"
    for targets in (("sm_89",), ("sm_86", "sm_89")):
        with pytest.raises(ValueError, match=r"TensorRT builds for the GPU at hand, sm_86; build for .* on such a GPU"):
            build_engine(toy_onnx, tmp_path / "no.engine", dataclasses.replace(options, targets=targets))


@dataclasses.dataclass(frozen=True)
class Timings:
    """A stand-in for a timing cache: TensorRT-RTX's own does nothing."""

    content: bytes

    def serialize(self) -> bytes:
        return self.content + b"+"


def test_timing_cache(
    local_backend: EngineBackend, toy_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def set_timings(config: object, cache: Timings, ignore_mismatch: bool) -> bool:
        given.append((cache.content, ignore_mismatch))
        return b"other" not in cache.content

    monkeypatch.setattr(tensorrt_rtx.IBuilderConfig, "create_timing_cache", lambda _, content: Timings(content))
    monkeypatch.setattr(tensorrt_rtx.IBuilderConfig, "set_timing_cache", set_timings)
    cache = tmp_path / "caches" / "timings"
    options = BuildOptions(local_backend, (1,), timing_cache=cache)
    for expected in (b"+", b"++"):
        build_engine(toy_onnx, tmp_path / "toy.engine", options)
        assert cache.read_bytes() == expected
    assert given == [(b"", False), (b"+", False)]
    cache.write_bytes(b"other")
    with pytest.raises(ValueError, match="timings holds no timings of this version of TensorRT on this GPU; remove it"):
        build_engine(toy_onnx, tmp_path / "no.engine", options)
    assert cache.read_bytes() == b"other"
    assert not (tmp_path / "no.engine").exists()


def test_killed_at_the_worst_moment(toy_onnx: Path) -> None:
    """Between the manifest and the engine: nothing is taken for an engine, and the older one says what it is."""
    engine = toy_onnx.with_suffix(".engine")
    script = f"""
import os, signal
from pathlib import Path
from asag.runtime.engines import build as engine_build
from asag.runtime.files import write_json
def killed(path, values):
    write_json(path, values)
    os.kill(os.getpid(), signal.SIGKILL)
engine_build.write_json = killed
engine_build.build_engine({str(toy_onnx)!r}, {str(engine)!r})
"""
    for older in (b"", b"an older engine"):
        if older:
            engine.write_bytes(older)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert [path.name for path in toy_onnx.parent.glob("*.engine")] == (["toy.engine"] if older else [])
        assert [path.name for path in toy_onnx.parent.glob(".*.engine")] == []
    with pytest.raises(ValueError, match=r"is damaged or is not the engine that its manifest describes"):
        open_session(engine)


def test_an_engine_for_another_gpu_says_what_to_build(built: BuildResult) -> None:
    path, manifest = built.engine_path, built.manifest
    check_target(path, manifest, "GPU", (8, 6))
    with pytest.raises(
        ValueError, match=r"built for sm_86, and RTX 4090 is sm_89; .*--backend tensorrt-rtx --target sm_89"
    ):
        check_target(path, dataclasses.replace(manifest, targets=("sm_86",)), "RTX 4090", (8, 9))


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
    damaged = [
        "",
        "[]",
        "{",
        json.dumps(values | {"format": 99}),
        json.dumps(values | {"profiles": [[1, 1, 1], [3, 4, 4]]}),
        json.dumps(values | {"plugins": {"SamplingMixing": -1}}),
        json.dumps(values | {"engine_layers": []}),
    ]
    layers = values["engine_layers"]
    damaged += [json.dumps(values | {"engine_layers": layers | {name: [None]}}) for name in layers]
    damaged += [
        json.dumps(values | {"engine_layers": {key: layers[key] for key in layers if key != n}}) for n in layers
    ]
    damaged += [json.dumps({name: value for name, value in values.items() if name != left_out}) for left_out in values]
    damaged.append(json.dumps(values | {"metadata": {}}))
    for text in damaged:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"manifest|asag") as caught:
            open_session(built.engine_path)
        assert "\n" not in str(caught.value)
    for later, message in (
        (4, "written by a newer version .*update asag, or build"),
        (2, "format 2, this .*build the"),
    ):
        path.write_text(json.dumps(values | {"format": later}))
        with pytest.raises(ValueError, match=message):
            open_session(built.engine_path)
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
        BuildOptions(batch=(1, 4, 2))
    with pytest.raises(ValueError, match=r"unknown GPU architecture 'sm_90'.*sm_86"):
        BuildOptions(targets=("sm_90",))
    with pytest.raises(ValueError, match="unknown op lowering 'both'; choose one of plugins, inlined"):
        BuildOptions(op_lowering="both")
    with pytest.raises(ValueError, match=r"TensorRT-RTX has no plugins; .* the backend tensorrt"):
        BuildOptions(op_lowering="plugins")
    with pytest.raises(ValueError, match="TensorRT-RTX keeps no timing cache"):
        BuildOptions(timing_cache=tmp_path / "timings")
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
    assert build_engine(foreign, engine, BuildOptions(batch=(2,))).manifest.profiles == ((2, 2, 2),)


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


def test_a_graph_that_would_end_the_parsers_process_is_refused(tmp_path: Path) -> None:
    path, engine = tmp_path / "damaged.onnx", tmp_path / "damaged.engine"
    model = build_toy_model(toy_metadata())
    model.graph.node[2].input[0] = "nowhere"
    onnx.save(model, path)
    with pytest.raises(ValueError, match=r"damaged\.onnx: damaged, export it again .*nowhere"):
        build_engine(path, engine)
    path.write_bytes(build_toy_model(toy_metadata()).SerializeToString().replace(b"CellScores", b"Cell\xffcores"))
    with pytest.raises(ValueError, match="a name in the file is no text"):
        build_engine(path, engine)
