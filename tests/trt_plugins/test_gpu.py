"""The compiled kernels on a GPU, against the PyTorch definitions on the CPU: `pytest -m gpu`."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from asag.deploy import DeployedDetector
from asag.export.model import export_onnx
from asag.ops import (
    adaptive_probing_definition,
    deformable_attention_definition,
    gather_anchors_definition,
    pyramid_roi_align_definition,
    sample_grid_definition,
    sampling_mixing_definition,
    select_tokens_definition,
)
from asag.runtime import open_session
from asag.runtime.engines.backend import TENSORRT
from asag.runtime.engines.build import BuildOptions, build_engine
from asag.trt_plugins.launch import DeviceArray, current_capability, launch
from asag.trt_plugins.operations import OPERATIONS
from asag.trt_plugins.plugins import register_plugins
from benchmarks import kernel_cases
from benchmarks.kernel_cases import op_model, signature
from tests.builders import random_detector, small_info
from tests.trt_plugins.kernel_cases import (
    DEMO,
    LEVELS,
    PUBLISHED,
    RELU_IN_PIXELS,
    SAMPLINGS,
    TOLERANCE,
    TORCH_TYPES,
    Array,
    attention_inputs,
    grid_inputs,
    mixing_inputs,
    probing_inputs,
    pyramid,
    roi_boxes,
    scores_with_ties,
    tensors,
    to_element,
    to_float,
)

pytestmark = pytest.mark.gpu


def run(
    name: str,
    inputs: list[Array],
    attributes: Mapping[str, Any] | None = None,
    element: str = "float32",
    channels_last: bool = False,
    tensor_cores: bool = True,
) -> list[torch.Tensor]:
    """Launch twice; the results must be the same bits."""
    operation = OPERATIONS[name]
    on_gpu = []
    for tensor, array in zip(operation.inputs, inputs, strict=True):
        value = torch.from_numpy(array).cuda()
        if tensor.type == "element":
            value = value.to(TORCH_TYPES[element])
        if tensor.pyramid and channels_last:
            value = value.contiguous(memory_format=torch.channels_last)
        on_gpu.append(value)
    shapes = operation.output_shapes([array.shape for array in inputs], attributes or {})
    runs = []
    for fill in (0xA5, 0x5A):
        outputs = []
        for tensor, shape in zip(operation.outputs, shapes, strict=True):
            dtype = getattr(torch, tensor.resolve(element))
            output = torch.empty(tuple(shape), dtype=dtype, device="cuda")
            output.view(torch.uint8).fill_(fill) if dtype != torch.bool else output.fill_(fill == 0xA5)
            outputs.append(output)
        stream = torch.cuda.current_stream().cuda_stream
        arrays = [[DeviceArray.of_tensor(value) for value in values] for values in (on_gpu, outputs)]
        launch(name, *arrays, attributes, stream, tensor_cores)
        torch.cuda.synchronize()
        runs.append([output.cpu() for output in outputs])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8)), f"{name} gives different bits"
    return runs[0]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (actual.float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("element", TOLERANCE)
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(("count", "capacity"), [(40, 5), (250, 12), (750, 60), (3000, 60)])
def test_probing(count: int, capacity: int, coarse: bool, element: str) -> None:
    inputs = probing_inputs(count, batch=3, count=count, cells=(50, 76), coarse=coarse)
    inputs[0][:, ::7, 4] = np.nan
    outputs = run("AdaptiveProbing", inputs, {"stride": 16, "capacity": capacity}, element)
    expected = adaptive_probing_definition(*tensors(*inputs), 16, capacity)
    assert torch.equal(outputs[0], expected.patches.to(TORCH_TYPES[element]))
    for actual, wanted in zip(outputs[1:], expected[1:], strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(
    ("count", "first", "fewest", "most"), [(160, 60, 70, 100), (490, 250, 5, 200), (6750, 750, 50, 500)]
)
def test_gather(count: int, first: int, fewest: int, most: int, coarse: bool) -> None:
    anchors, valid, _, _ = probing_inputs(count, batch=3, count=count, coarse=coarse)
    anchors[:, ::7, 4] = np.nan
    for threshold in (0.05, 0.97):
        attributes = {"first": first, "keep_threshold": threshold, "fewest": fewest, "most": most}
        actual = run("GatherAnchors", [anchors, valid], attributes)
        expected = gather_anchors_definition(*tensors(anchors, valid), *attributes.values())  # type: ignore[arg-type]
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("element", TOLERANCE)
@pytest.mark.parametrize(("channels", "finest"), [(256, (100, 152)), (12, (3, 5)), (64, (1, 1))])
def test_align(channels: int, finest: tuple[int, int], element: str, channels_last: bool) -> None:
    random = np.random.default_rng(0)
    maps = [to_float(to_element(map_, element), element) for map_ in pyramid(random, 2, channels, finest)]
    boxes = roi_boxes(random, 2, 50, 4.0 * max(finest))
    (rois,) = run("PyramidRoIAlign", [*maps, boxes], None, element, channels_last)
    assert_close(rois, pyramid_roi_align_definition(*tensors(*maps, boxes)), TOLERANCE[element])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sizes", [DEMO, PUBLISHED], ids=["demo", "published"])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "float16 plain", "bfloat16 plain"])
@pytest.mark.parametrize("finest", [(40, 56), (1, 1)])
@pytest.mark.parametrize("options", [{}, RELU_IN_PIXELS], ids=["gelu", "relu in pixels"])
def test_mixing(
    options: dict[str, int], finest: tuple[int, int], kind: str, sizes: tuple[int, int, int, int], channels_last: bool
) -> None:
    element = kind.split(maxsplit=1)[0]
    *maps, points, parameters = mixing_inputs(1, 2, 30, sizes, finest, options.get("point_unit", 4))
    rounded = [to_float(to_element(array, element), element) for array in (*maps, parameters)]
    inputs = [*rounded[:4], points, rounded[4]]
    attributes = {"mixed_points": sizes[3], **options}
    (mixed,) = run("SamplingMixing", inputs, attributes, element, channels_last, tensor_cores="plain" not in kind)
    assert_close(mixed, sampling_mixing_definition(*tensors(*inputs), **attributes), TOLERANCE[element])


@pytest.mark.parametrize("element", TOLERANCE)
@pytest.mark.parametrize("channels", [32, 12, 3])
@pytest.mark.parametrize("queries", [7, 3000])
def test_attention(queries: int, channels: int, element: str) -> None:
    value, locations, weights = attention_inputs(1, 2, queries, 8, channels)
    rounded = [to_float(to_element(array, element), element) for array in (value, weights)]
    inputs = [rounded[0], locations, rounded[1]]
    (attended,) = run("MultiScaleDeformableAttention", inputs, LEVELS, element)
    assert_close(attended, deformable_attention_definition(*tensors(*inputs), **LEVELS), TOLERANCE[element])


@pytest.mark.parametrize("element", TOLERANCE)
@pytest.mark.parametrize("attributes", SAMPLINGS)
def test_samples(attributes: dict[str, int], element: str) -> None:
    value, grid = grid_inputs(1, (16, 32, 80, 80), (300, 4))
    rounded = to_float(to_element(value, element), element)
    (samples,) = run("SampleGrid", [rounded, grid], attributes, element)
    assert_close(samples, sample_grid_definition(*tensors(rounded, grid), **attributes), TOLERANCE[element])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("tokens", "capacity"), [(60, 60), (22_323, 6_697), (60_000, 100)])
def test_selection(tokens: int, capacity: int, ties: bool) -> None:
    scores = np.random.default_rng(0).normal(size=(3, tokens)).astype(np.float32)
    inputs = [scores_with_ties(0, 3, tokens) if ties else scores, np.array([capacity, capacity // 3, 0])]
    expected = select_tokens_definition(*tensors(*inputs), capacity)
    for actual, wanted in zip(run("SelectTokens", inputs, {"capacity": capacity}), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_a_cuda_graph_holds_a_launch() -> None:
    anchors, valid, _, _ = probing_inputs(count=160)
    attributes = {"first": 60, "keep_threshold": 0.1, "fewest": 5, "most": 50}
    inputs = [torch.from_numpy(anchors).cuda(), torch.from_numpy(valid).cuda()]
    boxes, taken = torch.zeros((2, 50, 4), device="cuda"), torch.zeros((2, 50), dtype=torch.bool, device="cuda")

    def start() -> None:
        launch("GatherAnchors", inputs, [boxes, taken], attributes, torch.cuda.current_stream().cuda_stream)

    start()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        start()
    inputs[0].copy_(torch.from_numpy(anchors[::-1].copy()))
    graph.replay()
    torch.cuda.synchronize()
    expected = gather_anchors_definition(inputs[0].cpu(), inputs[1].cpu(), *attributes.values())  # type: ignore[arg-type]
    assert torch.equal(boxes.cpu(), expected[0])


def test_pycuda_arrays_are_taken_as_they_are() -> None:
    if importlib.util.find_spec("pycuda") is None:
        pytest.skip("pycuda is not installed")
    import pycuda.autoprimaryctx  # type: ignore[import-not-found]  # noqa: F401
    from pycuda import gpuarray  # type: ignore[import-not-found]

    anchors, valid, _, _ = probing_inputs(count=160)
    attributes = {"first": 60, "keep_threshold": 0.1, "fewest": 5, "most": 50}
    outputs = [gpuarray.empty((2, 50, 4), np.float32), gpuarray.empty((2, 50), np.bool_)]
    launch("GatherAnchors", [gpuarray.to_gpu(anchors), gpuarray.to_gpu(valid)], outputs, attributes)
    expected = gather_anchors_definition(*tensors(anchors, valid), *attributes.values())  # type: ignore[arg-type]
    np.testing.assert_array_equal(outputs[0].get(), expected[0].numpy())


def test_compute_sanitizer_finds_nothing() -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    chosen = "test_probing or test_gather or test_align or test_mixing or test_attention or test_selection"
    tests = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", f"({chosen}) and not 3000 and not sanitizer"]
    for check in ("memcheck", "racecheck", "synccheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", "--target-processes", "all", *tests]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{check}:\n{result.stdout[-4000:]}"


def tensorrt_with_builder() -> ModuleType:
    trt = pytest.importorskip("tensorrt", reason="needs TensorRT with its builder")
    if trt.__name__ != "tensorrt":
        pytest.skip("needs TensorRT with its builder; here are only its bindings")
    return trt


def build_op(trt: ModuleType, model: bytes, just_in_time: bool) -> bytes:
    """An engine of one op: with its kernel inside, or one that calls back into Python for it."""
    register_plugins(current_capability())
    flags = trt.NetworkDefinitionCreationFlag
    preference = flags.PREFER_JIT_PYTHON_PLUGINS if just_in_time else flags.PREFER_AOT_PYTHON_PLUGINS
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) | 1 << int(preference))
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse(model), parser.get_error(0).desc()
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return bytes(engine)


@pytest.mark.parametrize("just_in_time", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_engine_gives_what_the_definition_gives(name: str, just_in_time: bool) -> None:
    trt = tensorrt_with_builder()
    shapes, attributes = signature(name, kernel_cases.DEMO, batch=2)
    inputs = OPERATIONS[name].sample(np.random.default_rng(0), shapes, attributes)
    content = build_op(trt, op_model(name, shapes, attributes), just_in_time)
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(content)
    context = engine.create_execution_context()
    values = {}
    for tensor, array in zip(OPERATIONS[name].inputs, inputs, strict=True):
        values[tensor.name] = torch.from_numpy(array).cuda()
    for tensor, shape in zip(OPERATIONS[name].outputs, OPERATIONS[name].output_shapes(shapes, attributes), strict=True):
        kind = getattr(torch, tensor.resolve("float32"))
        values[tensor.name] = torch.zeros(tuple(shape), dtype=kind, device="cuda")
    for key, value in values.items():
        context.set_tensor_address(key, value.data_ptr())
    assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    direct = run(name, inputs, attributes)
    for tensor, wanted in zip(OPERATIONS[name].outputs, direct, strict=True):
        assert torch.equal(values[tensor.name].cpu(), wanted), tensor.name


@pytest.mark.parametrize("op_lowering", ["plugins", "inlined"])
def test_an_engine_detects_what_the_exported_file_detects(op_lowering: str, tmp_path: Path) -> None:
    tensorrt_with_builder()
    model, engine = tmp_path / "small.onnx", tmp_path / "small.engine"
    export_onnx(DeployedDetector(random_detector(), small_info()), model)
    timings = tmp_path / "timings"
    options = BuildOptions(TENSORRT, (1, 4), op_lowering=op_lowering, timing_cache=timings)
    manifest = build_engine(model, engine, options).manifest
    used = {"AdaptiveProbing", "GatherAnchors", "PyramidRoIAlign", "SamplingMixing"}
    assert set(manifest.plugins) == (used if op_lowering == "plugins" else set())
    assert timings.stat().st_size > 0
    height, width = small_info().input.size
    images = [np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8) for seed in range(5)]
    with open_session(engine, device="cuda") as session, open_session(model) as reference:
        for ours, expected in zip(session.detect(images, 4), reference.detect(images), strict=True):
            assert np.abs(ours.scores - expected.scores).max() < 1e-3
