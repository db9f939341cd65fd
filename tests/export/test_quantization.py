"""int8 files: their numbers, which layers read rounded values, and the search for the layers to take back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from PIL import Image

from asag.export import quantization
from asag.export.calibration import largest_magnitudes
from asag.export.exported_file import read_exported
from asag.export.precision import convert_precision
from asag.export.quantization import quantize_int8
from asag.export.quantized_graph import int8_step, quantizable_layers, quantize_layers
from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.engines.backend import TENSORRT_RTX
from asag.runtime.engines.build import build_engine
from asag.runtime.errors import BackendUnavailableError
from asag.runtime.metadata import ModelMetadata
from asag.runtime.opening import open_session
from asag.runtime.preprocessing import load_image, prepare
from tests.builders import random_picture
from tests.exports import small_export
from tests.runtime.coco_files import entry as annotation
from tests.runtime.coco_files import write_split

ANCHOR_CONVOLUTIONS = 3 * 2 + 1  # two for each of P3, P4 and P5, and the one of P6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantization")
    for seed in range(3):
        Image.fromarray(random_picture(seed, 120, 150)).save(path / f"{seed}.png")
    return path


@pytest.fixture(scope="module")
def images(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return small_export().write(folder / "model.onnx")


@pytest.fixture(scope="module")
def exported(model: Path) -> onnx.ModelProto:
    return onnx.load(model)


@pytest.fixture(scope="module")
def metadata(exported: onnx.ModelProto) -> ModelMetadata:
    return small_export().metadata


@pytest.fixture(scope="module")
def magnitudes(exported: onnx.ModelProto, metadata: ModelMetadata, images: list[Path]) -> dict[str, float]:
    return largest_magnitudes(exported, metadata, images)


@pytest.fixture(scope="module")
def quantized(exported: onnx.ModelProto, metadata: ModelMetadata, magnitudes: dict[str, float]) -> onnx.ModelProto:
    return quantize_layers(exported, metadata, magnitudes, list(quantizable_layers(exported.graph, metadata)))


class Values:
    """Constants, types and producers of a graph by the name of the value."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.producer = {name: node for node in graph.node for name in node.output}
        self.types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}

    def dequantized(self, name: str) -> tuple[np.ndarray | onnx.NodeProto, np.ndarray, np.ndarray]:
        """What a DequantizeLinear reads (a constant, or the QuantizeLinear), its scale and its zero point."""
        node = self.producer[name]
        assert node.op_type == "DequantizeLinear"
        source = node.input[0]
        given = self.constants[source] if source in self.constants else self.producer[source]
        return given, self.constants[node.input[1]], self.constants[node.input[2]]


@given(st.floats(1e-6, 65504.0))
def test_the_step_is_the_smallest_float16_that_reaches(largest: float) -> None:
    step = int8_step(largest)
    assert step.dtype == np.float32
    assert np.float16(step) == step
    assert float(step) * 127 >= largest
    assert float(np.nextafter(np.float16(step), np.float16(0))) * 127 < largest


def test_a_value_that_is_always_zero_has_a_step() -> None:
    np.testing.assert_array_equal(int8_step(np.array([0.0, 127.0])), [1.0, 1.0])


def test_weights_are_within_half_a_step_of_each_channel(
    exported: onnx.ModelProto, metadata: ModelMetadata, quantized: onnx.ModelProto
) -> None:
    before, after = quantizable_layers(exported.graph, metadata), Values(quantized.graph)
    originals = Values(exported.graph).constants
    convolutions = {node.name: node for node in quantized.graph.node if node.op_type == "Conv"}
    assert len(before) == 20
    for node in before.values():
        exact = originals[node.input[1]]
        weight, scale, zero_point = after.dequantized(convolutions[node.name].input[1])
        assert isinstance(weight, np.ndarray)
        assert weight.dtype == np.int8
        assert weight.shape == exact.shape
        assert scale.shape == zero_point.shape == exact.shape[:1]  # one for each output channel
        assert scale.dtype == np.float16
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
        step = scale.astype(np.float64).reshape(-1, 1, 1, 1)
        assert (np.abs(weight * step - exact) <= step * 0.5001).all()
        # The step is no larger than it must be: every channel uses the range.
        assert (np.abs(weight.astype(int)).max(axis=(1, 2, 3)) >= 126).all()
        assert weight.min() >= -127


def test_activations_have_one_step_that_reaches_what_was_seen(
    exported: onnx.ModelProto, metadata: ModelMetadata, quantized: onnx.ModelProto, magnitudes: dict[str, float]
) -> None:
    after = Values(quantized.graph)
    convolutions = {node.name: node for node in quantized.graph.node if node.op_type == "Conv"}
    for node in quantizable_layers(exported.graph, metadata).values():
        source, scale, zero_point = after.dequantized(convolutions[node.name].input[0])
        assert isinstance(source, onnx.NodeProto)
        assert source.op_type == "QuantizeLinear"
        assert scale.shape == zero_point.shape == ()
        assert (zero_point.dtype, int(zero_point)) == (np.int8, 0)
        assert float(after.constants[source.input[1]]) == float(scale)
        largest = magnitudes[node.input[0]]
        assert largest <= float(scale) * 127 <= largest * 1.001


def test_magnitudes_are_those_of_the_images(
    exported: onnx.ModelProto, metadata: ModelMetadata, images: list[Path], magnitudes: dict[str, float]
) -> None:
    """The first convolution reads the normalized picture, whose range is known; more images, no smaller range."""
    first = next(iter(quantizable_layers(exported.graph, metadata).values())).input[0]
    pixels = np.stack([np.asarray(Image.open(path)) for path in images]) / 255
    normalized = np.abs((pixels - np.array(metadata.mean)) / np.array(metadata.std)).max()
    assert 0.9 * normalized < magnitudes[first] < normalized + 1e-4  # resizing rounds the extremes off
    done: list[float] = []
    alone = largest_magnitudes(exported, metadata, images[:1], done.append)
    assert alone.keys() == magnitudes.keys()
    assert all(alone[name] <= magnitudes[name] for name in alone)
    assert done == [0.0, 1.0]


def test_types_and_the_contract(exported: onnx.ModelProto, quantized: onnx.ModelProto) -> None:
    onnx.checker.check_model(quantized, full_check=True)
    onnx.checker.check_model(onnx.inliner.inline_local_functions(quantized), full_check=True)
    onnx.shape_inference.infer_shapes(quantized, check_type=True, strict_mode=True)
    assert list(quantized.graph.input) == list(exported.graph.input)
    assert list(quantized.graph.output) == list(exported.graph.output)
    assert list(quantized.functions) == list(exported.functions)
    values = Values(quantized.graph)
    convolutions = [node for node in quantized.graph.node if node.op_type == "Conv"]
    by_type = {
        kind: sum(values.types[node.output[0]] == kind for node in convolutions)
        for kind in (TensorProto.FLOAT16, TensorProto.FLOAT)
    }
    assert by_type == {TensorProto.FLOAT16: 20, TensorProto.FLOAT: ANCHOR_CONVOLUTIONS}


def test_only_int8_layers_and_shortcuts_read_rounded_values(
    exported: onnx.ModelProto, metadata: ModelMetadata, magnitudes: dict[str, float]
) -> None:
    """Of three layers that read one value, the one taken back gets it unrounded and keeps a float16 weight."""
    layers = quantizable_layers(exported.graph, metadata)
    readers = [name for name, node in layers.items() if node.input[0] == layers["backbone.layer2.0.conv1"].input[0]]
    assert len(readers) == 3  # with the shortcut's and the neck's
    graph = quantize_layers(exported, metadata, magnitudes, [name for name in layers if name != readers[0]]).graph
    values = Values(graph)
    dequantized = {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] not in values.constants
    }
    by_name = {node.name: node for node in graph.node if node.op_type == "Conv"}
    back = by_name[layers[readers[0]].name]
    assert values.constants[back.input[1]].dtype == np.float16
    assert back.input[0] not in dequantized
    assert all(by_name[layers[name].name].input[0] in dequantized for name in readers[1:])
    others = {node.op_type for node in graph.node if dequantized & set(node.input) and node.name not in by_name}
    assert others == {"Add"}


def test_without_layers_it_is_the_float16_file(
    exported: onnx.ModelProto, metadata: ModelMetadata, magnitudes: dict[str, float]
) -> None:
    assert quantize_layers(exported, metadata, magnitudes, []) == convert_precision(exported, "fp16", metadata)


def test_activations_beyond_float16_are_refused(
    exported: onnx.ModelProto, metadata: ModelMetadata, magnitudes: dict[str, float]
) -> None:
    layers = quantizable_layers(exported.graph, metadata)
    name = layers["backbone.layer3.0.conv2"].input[0]
    with pytest.raises(ValueError, match=f"activation {name} reaches 1e\\+05, more than the float16"):
        quantize_layers(exported, metadata, magnitudes | {name: 1e5}, list(layers))


def test_calibration_alone(model: Path, images: list[Path], tmp_path: Path) -> None:
    phases: list[tuple[str, float]] = []
    report = quantize_int8(model, tmp_path / "int8.onnx", images, progress=lambda *step: phases.append(step))
    assert report.accuracy is None
    assert {layer.precision for layer in report.layers} == {"int8"}
    assert report.calibration_images == len(images)
    assert report.bytes == report.path.stat().st_size < 0.75 * model.stat().st_size
    assert "20 of 20 convolutions" in report.summary()[0]
    assert "unknown until `asag parity`" in report.summary()[1]
    assert phases[-1] == ("calibrating", 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]
    with open_session(model) as reference, open_session(report.path) as session:
        assert session.precision == "int8"
        inputs = prepare([load_image(path) for path in images], session.metadata)
        found, expected = (each.run(inputs)["scores"] for each in (session, reference))
    assert 0 < np.abs(found - expected).mean() < 0.02


class Search:
    """Stands in for the models: AP falls by what each layer in int8 costs, and evaluations are counted."""

    def __init__(self, costs: dict[str, float], float16: float = 0.0) -> None:
        self.costs, self.float16, self.tried = costs, float16, 0
        self.source = Path("model.onnx")

    def report(self, phase: str, fraction: float) -> None:
        assert 0 <= fraction <= 1

    def average_precision(self, layers: Sequence[str] | None, *_: Any) -> float:
        self.tried += 1
        return 0.7 if layers is None else 0.7 - self.float16 - sum(self.costs[name] for name in layers)

    def scores(self, layers: Sequence[str], images: Sequence[Path]) -> np.ndarray:
        return np.full((1, 4), 0.5 - sum(self.costs[name] for name in layers))


def search(costs: dict[str, float], budget: float | None, float16: float = 0.0) -> tuple[Any, Search]:
    trial = Search(costs, float16)
    dataset = SimpleNamespace()
    return quantization._within_budget(trial, list(costs), dataset, (1, 2), budget, ()), trial  # type: ignore[arg-type]


@given(st.lists(st.floats(0.001, 0.1), min_size=1, max_size=60), st.floats(0.0, 1.0))
def test_no_more_layers_go_back_than_must(costs: list[float], budget: float) -> None:
    named = {f"layer{number}": cost for number, cost in enumerate(costs)}
    (kept, measured, accuracy), trial = search(named, budget)
    dropped = sum(named[name] for name in kept)
    assert dropped <= budget + 1e-9
    assert accuracy.written == pytest.approx(0.7 - dropped)
    assert accuracy.all_int8 == pytest.approx(0.7 - sum(costs))
    assert trial.tried <= 3 + math.ceil(math.log2(len(costs) + 1))
    back = sorted((named[name] for name in named if name not in kept), reverse=True)
    if back:
        assert measured == pytest.approx(named)
        assert back == pytest.approx(sorted(costs, reverse=True)[: len(back)])  # the worst first
        assert dropped + back[-1] > budget - 1e-9  # one fewer would not do


def test_a_measurement_without_a_budget_takes_nothing_back() -> None:
    (kept, measured, accuracy), trial = search({"a": 0.3, "b": 0.1}, None)
    assert (kept, measured, trial.tried) == (("a", "b"), {}, 2)
    assert accuracy.budget is None


def test_a_budget_that_float16_alone_breaks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"AP falls from 0\.7000 to 0\.6900 with no layer in int8.*than the 0\.005"):
        search({"a": 0.3}, 0.005, float16=0.01)


def test_nothing_is_written_when_the_budget_is_refused(
    model: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, metadata = read_exported(model)
    classes = zip(metadata.category_ids, metadata.category_names, strict=True)
    categories = [{"id": number, "name": name} for number, name in classes]
    annotations = write_split(tmp_path / "data", [annotation(category_id=categories[0]["id"])], categories=categories)
    dataset = CocoFolder(tmp_path / "data" / "val2017", annotations)
    monkeypatch.setattr(quantization._Trial, "average_precision", lambda _, layers, *rest: 0.7 if layers is None else 0)
    output = tmp_path / "int8.onnx"
    output.write_text("an older file")
    with pytest.raises(ValueError, match="with no layer in int8"):
        quantize_int8(model, output, images, dataset, 0.1)
    assert output.read_text() == "an older file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "int8.onnx"]


def test_bad_input(model: Path, images: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "int8.onnx"
    damaged, foreign, picture = tmp_path / "damaged.onnx", tmp_path / "foreign.onnx", tmp_path / "picture.png"
    damaged.write_bytes(model.read_bytes()[:1000])
    picture.write_text("no picture")
    proto = onnx.load(model)
    del proto.metadata_props[:]
    onnx.save(proto, foreign)
    cases: list[tuple[Path, list[Path], dict[str, Any], str]] = [
        (model, [], {}, "no calibration images"),
        (tmp_path / "no.onnx", images, {}, "model not found"),
        (damaged, images, {}, "cannot read .*damaged.onnx as ONNX"),
        (foreign, images, {}, "foreign.onnx: not an asag model"),
        (model, [picture], {}, "picture.png is not an image"),
        (model, images, {"max_ap_drop": 0.01}, "needs a dataset"),
    ]
    for source, calibration, options, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            quantize_int8(source, output, calibration, **options)
    for precision in ("fp16", "int8"):
        made = tmp_path / f"{precision}.onnx"
        proto = onnx.load(model)
        for entry in proto.metadata_props:
            if entry.key == "asag.precision":
                entry.value = f'"{precision}"'
        onnx.save(proto, made)
        with pytest.raises(ValueError, match=f"{precision}.onnx: it is {precision} already"):
            quantize_int8(made, tmp_path / "again.onnx", images)
    assert not (tmp_path / "again.onnx").exists()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_tensorrt_rtx_builds_it(
    exported: onnx.ModelProto, metadata: ModelMetadata, quantized: onnx.ModelProto, tmp_path: Path, precision: str
) -> None:
    try:
        TENSORRT_RTX.load()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    model = quantized if precision == "int8" else convert_precision(exported, "bf16", metadata)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    built = build_engine(path, tmp_path / "model.engine")
    types = built.manifest.layer_types
    if precision == "bf16":
        assert types["bf16"] > 40
        return
    assert types["int8"] == sum(node.op_type == "QuantizeLinear" for node in model.graph.node) + 20  # and weights
    assert types["half"] > 40
    # Each is one kernel with both of its dequantizations, and reads int8.
    fused = built.manifest.engine_layers.fused if built.manifest.engine_layers else ()
    assert sum(count for _, nodes, count in fused if nodes == "Conv + DequantizeLinear + DequantizeLinear") == 20
    # The engine holds int8 weights, a cell's channels side by side as int8 convolutions read them; had it dequantized
    # them, it would hold float16. The first layer's three channels are padded.
    engine = built.engine_path.read_bytes()
    constants = Values(model.graph).constants
    weights = [value for value in constants.values() if value.ndim == 4 and value.dtype == np.int8]
    held = [value.transpose(0, 2, 3, 1).tobytes() in engine for value in weights]
    assert sum(held) >= len(weights) - 1 == 19
