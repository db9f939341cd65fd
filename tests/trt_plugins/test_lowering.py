"""From an exported file to what TensorRT's parser gets, and the builder's calls as far as they go without a GPU."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnxruntime
import pytest
from onnx import helper

from asag.export.op_bodies import HELPER_FUNCTIONS
from asag.runtime.engines.backend import TENSORRT
from asag.runtime.engines.build import BuildOptions, build_engine
from asag.runtime.engines.manifest import read_manifest
from asag.runtime.engines.network import read_source, with_plugins
from asag.runtime.errors import BackendUnavailableError
from asag.trt_plugins.operations import DOMAIN, OPERATIONS
from tests.builders import small_info
from tests.runtime.toy_detector import build_toy_model, toy_metadata

CAPABILITY = 90
USED = {"AdaptiveProbing": 2, "GatherAnchors": 1, "PyramidRoIAlign": 1, "SamplingMixing": 1}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU has compute capability 9.0."""
    monkeypatch.setattr("asag.trt_plugins.launch.current_capability", lambda: CAPABILITY)


def test_plugins_stand_without_bodies(exported: Path) -> None:
    source = read_source(exported)
    assert {item.name for item in source.proto.functions} == {*USED, *(item.name for item in HELPER_FUNCTIONS)}
    lowered, plugins = with_plugins(source)
    assert plugins == USED
    assert list(lowered.functions) == []
    nodes = [node for node in lowered.graph.node if node.domain == DOMAIN]
    assert {node.op_type for node in nodes} == set(USED)
    for node in nodes:
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert given.pop("plugin_namespace") == DOMAIN.encode()
        assert set(given) == {name for name, _ in OPERATIONS[node.op_type].attributes}
    onnx.checker.check_model(lowered)
    assert len(source.proto.functions) > 0, "the file's own model is untouched"


def test_nodes_from_before_there_was_an_attribute_get_its_default(exported: Path, tmp_path: Path) -> None:
    """As files of earlier releases are; without plugins they run by the bodies that they bring."""
    old = onnx.load(exported)
    for node in old.graph.node:
        if node.domain == DOMAIN:
            kept = [each for each in node.attribute if each.name not in OPERATIONS[node.op_type].defaults]
            del node.attribute[:]
            node.attribute.extend(kept)
    for body in old.functions:
        defaults = {each.name: each.i for each in body.attribute_proto}
        del body.attribute_proto[:]
        for attribute in (each for node in body.node for each in node.attribute if each.ref_attr_name in defaults):
            attribute.i, attribute.ref_attr_name = defaults[attribute.ref_attr_name], ""
    onnx.save(old, tmp_path / "old.onnx")
    models = [with_plugins(read_source(path))[0] for path in (exported, tmp_path / "old.onnx")]
    attributes = [
        [{each.name: helper.get_attribute_value(each) for each in node.attribute} for node in model.graph.node]
        for model in models
    ]
    assert attributes[0] == attributes[1]


def test_lowering_changes_nothing_but_the_bodies(exported: Path) -> None:
    """With its bodies back the lowered graph gives the bits of the file."""
    lowered, _ = with_plugins(read_source(exported))
    lowered.functions.extend(onnx.load(exported).functions)
    results = []
    height, width = small_info().input.size
    images = np.random.default_rng(0).integers(0, 256, (2, 3, height, width), np.uint8)
    sizes = np.array([[height, width], [height // 2, width]], np.float32)
    for content in (exported.read_bytes(), lowered.SerializeToString()):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"images": images, "sizes": sizes}))
    for before, after in zip(*results, strict=True):
        np.testing.assert_array_equal(before, after)


def test_functions_without_a_plugin_are_inlined(tmp_path: Path) -> None:
    path = tmp_path / "toy.onnx"
    onnx.save(build_toy_model(toy_metadata()), path)
    lowered, plugins = with_plugins(read_source(path))
    assert plugins == {}
    assert "AveragePool" in {node.op_type for node in lowered.graph.node}
    assert all(node.domain != DOMAIN for node in lowered.graph.node)
    onnx.checker.check_model(lowered, full_check=True)


def test_a_node_that_names_no_plugin_is_refused(exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported)
    node = next(node for node in model.graph.node if node.op_type == "GatherAnchors")
    kept = [attribute for attribute in node.attribute if attribute.name != "plugin_namespace"]
    del node.attribute[:]
    node.attribute.extend(kept)
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(ValueError, match=r"old\.onnx: node .* names no plugin; export it again"):
        with_plugins(read_source(tmp_path / "old.onnx"))


def skip_where_tensorrt_is_whole(tensorrt: ModuleType) -> None:
    if tensorrt.__name__ == "tensorrt":
        pytest.skip("TensorRT is installed with its builder; `pytest -m gpu` builds for real")


def test_without_a_gpu(tensorrt: ModuleType, exported: Path, tmp_path: Path) -> None:
    skip_where_tensorrt_is_whole(tensorrt)
    with pytest.raises(BackendUnavailableError, match="TensorRT builds on the GPU that the engine is for"):
        build_engine(exported, tmp_path / "small.engine", BuildOptions(TENSORRT))


def test_the_genuine_bindings_up_to_the_builder(
    tensorrt: ModuleType, gpu: None, compiler: None, exported: Path, tmp_path: Path
) -> None:
    skip_where_tensorrt_is_whole(tensorrt)
    with pytest.raises(BackendUnavailableError, match="TensorRT's builder does not start: ") as caught:
        build_engine(exported, tmp_path / "small.engine", BuildOptions(TENSORRT))
    assert "\n" not in str(caught.value)
    registered = {creator.name for creator in tensorrt.get_plugin_registry().all_creators}
    assert set(OPERATIONS) <= registered
    assert list(tmp_path.iterdir()) == []


class StandInBuilder:
    """Notes what a build asks for; its engine is the parsed file."""

    def __init__(self, trt: ModuleType) -> None:
        self.trt = trt
        self.flags = 0
        self.parsed = b""
        self.config: Any = None
        self.shapes: list[dict[str, tuple[tuple[int, ...], ...]]] = []

    def module(self) -> SimpleNamespace:
        """As much of TensorRT's module as a build uses, with the genuine enumerations and base classes."""
        names = ("NetworkDefinitionCreationFlag", "BuilderFlag", "ProfilingVerbosity", "MemoryPoolType")
        genuine = {name: getattr(self.trt, name) for name in (*names, "ILogger", "IProgressMonitor", "__version__")}
        return SimpleNamespace(**genuine, Builder=lambda logger: self, OnnxParser=lambda network, logger: self)

    def create_network(self, flags: int) -> SimpleNamespace:
        self.flags = flags
        return SimpleNamespace(num_layers=0)

    def parse(self, content: bytes) -> bool:
        self.parsed = content
        return True

    def create_builder_config(self) -> SimpleNamespace:
        on: set[Any] = {self.trt.BuilderFlag.TF32}  # TensorRT's default
        limits: dict[Any, int] = {}
        self.config = SimpleNamespace(
            on=on,
            limits=limits,
            set_flag=on.add,
            clear_flag=on.discard,
            set_memory_pool_limit=limits.__setitem__,
            add_optimization_profile=self.shapes.append,
        )
        return self.config

    def create_optimization_profile(self) -> Any:
        class Profile(dict[str, tuple[tuple[int, ...], ...]]):
            def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
                self[name] = shapes

        return Profile()

    def build_serialized_network(self, network: Any, config: Any) -> bytes:
        return self.parsed


@pytest.mark.parametrize("tf32", [False, True])
def test_what_tensorrts_builder_is_asked_for(
    tensorrt: ModuleType,
    gpu: None,
    compiler: None,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tf32: bool,
) -> None:
    builder = StandInBuilder(tensorrt)
    monkeypatch.setattr("asag.runtime.engines.backend.EngineBackend.load", lambda backend: builder.module())
    options = BuildOptions(TENSORRT, (1, 4), ("sm_90",), workspace_mib=512, tf32=tf32)
    result = build_engine(exported, tmp_path / "small.engine", options)

    flags = tensorrt.NetworkDefinitionCreationFlag
    assert builder.flags == 1 << int(flags.STRONGLY_TYPED) | 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS)
    parsed = onnx.load_model_from_string(builder.parsed)
    assert list(parsed.functions) == []
    assert sum(node.domain == DOMAIN for node in parsed.graph.node) == sum(USED.values())
    assert (tensorrt.BuilderFlag.TF32 in builder.config.on) == tf32
    assert builder.config.profiling_verbosity == tensorrt.ProfilingVerbosity.DETAILED
    assert builder.config.limits == {tensorrt.MemoryPoolType.WORKSPACE: 512 << 20}
    height, width = small_info().input.size
    pixels = [tuple((size, 3, height, width) for size in batches) for batches in ((1, 1, 1), (2, 4, 4))]
    assert [shapes["images"] for shapes in builder.shapes] == pixels
    assert builder.shapes[1]["sizes"] == ((2, 2), (4, 2), (4, 2))

    manifest = read_manifest(result.engine_path)
    assert (manifest.backend, manifest.version) == ("tensorrt", tensorrt.__version__)
    assert (manifest.targets, manifest.op_lowering, manifest.plugins) == (("sm_90",), "plugins", USED)
    assert manifest.tf32 == tf32


def test_inlined_on_tensorrt_has_no_plugins(
    tensorrt: ModuleType, gpu: None, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = StandInBuilder(tensorrt)
    monkeypatch.setattr("asag.runtime.engines.backend.EngineBackend.load", lambda backend: builder.module())
    options = BuildOptions(TENSORRT, (1,), op_lowering="inlined")
    manifest = build_engine(exported, tmp_path / "small.engine", options).manifest
    parsed = onnx.load_model_from_string(builder.parsed)
    assert all(node.domain != DOMAIN for node in parsed.graph.node)
    assert (manifest.op_lowering, manifest.plugins) == ("inlined", {})
