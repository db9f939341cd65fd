"""Which nodes of an adopted file bear 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from asag.export.adoption.adopt import adopt
from asag.export.adoption.pictures import made_up
from asag.export.adoption.plan import AdoptionOptions
from asag.export.conversion import convert_file
from asag.export.foreign_precision import bearing_nodes, too_large
from asag.export.quantization import quantize_int8
from asag.runtime.opening import open_session
from asag.trt_plugins.operations import DOMAIN
from tests.export.adoption.toy_peers import make_toy

SIZE = (64, 96)


def graph_of(nodes: list[onnx.NodeProto], **weights: tuple[int, ...]) -> onnx.GraphProto:
    tensors = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in weights.items()]
    value = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])
    return helper.make_graph(nodes, "graph", [value], [onnx.ValueInfoProto(name="result")], tensors)


def borne(graph: onnx.GraphProto, kept: tuple[str, ...] = ()) -> list[str]:
    return [graph.node[index].op_type for index in sorted(bearing_nodes(graph, kept))]


def test_what_follows_a_convolution_until_something_else_is_read() -> None:
    node = helper.make_node
    graph = graph_of(
        [
            node("Mul", ["images", "scale"], ["scaled"]),
            node("Conv", ["scaled", "kernel"], ["maps"]),
            node("Relu", ["maps"], ["active"]),
            node("Resize", ["active", "", "scale"], ["wide"]),
            node("Add", ["wide", "scaled"], ["mixed"]),
            node("LayerNormalization", ["wide", "scale"], ["normed"]),
            node("Add", ["normed", "mixed"], ["result"]),
        ],
        kernel=(8, 3, 1, 1),
        scale=(1,),
    )
    assert borne(graph) == ["Conv", "Relu", "Resize"]
    assert borne(graph, kept=("active",)) == ["Conv"]
    assert too_large(graph, {"maps": 9000.0, "active": 7000.0}) == ("maps",)


@pytest.mark.parametrize(
    ("reader", "bears"),
    [("LayerNormalization", True), ("MatMul", True), ("Softmax", False), ("Sigmoid", False), ("Exp", False)],
)
@pytest.mark.parametrize("side", [64, 63])
def test_large_products_that_lead_to_a_norm_or_another(reader: str, bears: bool, side: int) -> None:
    more = ["matrix"] if reader in ("LayerNormalization", "MatMul") else []
    nodes = [
        helper.make_node("MatMul", ["images", "matrix"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["moved"]),
        helper.make_node(reader, ["moved", *more], ["read"]),
        helper.make_node("Log", ["read"], ["result"]),
    ]
    graph = graph_of(nodes, matrix=(side, side), bias=(side,))
    assert ("MatMul" in borne(graph)[:1]) == (bears and side == 64)


def test_products_that_are_results_or_places_stay() -> None:
    nodes = [helper.make_node("MatMul", ["images", "matrix"], ["result"])]
    assert not borne(graph_of(nodes, matrix=(64, 64)))
    nodes = [
        helper.make_node("MatMul", ["images", "matrix"], ["places"]),
        helper.make_node("GridSample", ["images", "places"], ["result"]),
    ]
    assert not borne(graph_of(nodes, matrix=(64, 64)))


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adopted")
    onnx.save(make_toy(operator_set=17), folder / "foreign.onnx")
    adopt(folder / "foreign.onnx", folder / "adopted.onnx", AdoptionOptions())
    for number in range(2):
        made_up(number, SIZE).save(folder / f"{number}.png")
    return folder / "adopted.onnx"


def scores(path: Path) -> np.ndarray:
    with open_session(path, threads=1) as session:
        return np.stack([found.scores for found in session.detect([np.asarray(made_up(n, SIZE)) for n in (3, 4)])])


def test_an_adopted_file_in_half_precision(adopted: Path, tmp_path: Path) -> None:
    assert convert_file(adopted, tmp_path / "half.onnx", "fp16") == ()
    proto = onnx.load(tmp_path / "half.onnx")
    onnx.checker.check_model(proto, full_check=True)
    halves = {node.op_type for node in proto.graph.node if node.output[0].endswith("_half")}
    assert {"Conv", "Relu", "MultiScaleDeformableAttention"} <= halves
    assert not halves & {"Softmax", "Sigmoid", "TopK"}
    np.testing.assert_allclose(scores(tmp_path / "half.onnx"), scores(adopted), atol=5e-3)


def test_what_is_large_on_a_persons_images_stays(
    adopted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asag.export.foreign_precision.LARGEST_BEARABLE", 0.2)
    images = sorted(adopted.parent.glob("*.png"))
    kept = convert_file(adopted, tmp_path / "half.onnx", "fp16", images)
    assert kept
    proto = onnx.load(tmp_path / "half.onnx")
    assert not {f"{name}_half" for name in kept} & {name for node in proto.graph.node for name in node.output}


def test_without_images_made_up_ones_are_measured(adopted: Path, tmp_path: Path) -> None:
    """Also what our op samples, though no product or convolution of 16 bits makes it; masks may be infinite."""
    proto = onnx.load(adopted)
    value = next(node for node in proto.graph.node if node.op_type == "MultiScaleDeformableAttention").input[0]
    place, maker = next((place, node) for place, node in enumerate(proto.graph.node) if value in node.output)
    maker.output[0] = "small"
    for name, number in (("large", 1e4), ("none", -np.inf)):
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(number), name))
    more = (("Mul", ["small", "large"], value), ("Add", ["small", "none"], "masked"), ("Relu", ["masked"], "unread"))
    for number, (operator, inputs, output) in enumerate(more, start=place + 1):
        proto.graph.node.insert(number, helper.make_node(operator, inputs, [output]))
    onnx.save(proto, tmp_path / "large.onnx")
    kept = convert_file(tmp_path / "large.onnx", tmp_path / "half.onnx", "fp16")
    assert kept is not None
    assert value in kept
    ops = [node for node in onnx.load(tmp_path / "half.onnx").graph.node if node.domain == DOMAIN]
    assert [name.endswith("_half") for node in ops for name in node.output] == [False, True]


@pytest.mark.parametrize("operator_set", [17, 20])
def test_convolutions_in_int8(operator_set: int, adopted: Path, tmp_path: Path) -> None:
    """Also where the operator set knows no scales in float16."""
    source = adopted
    if operator_set != 17:
        onnx.save(make_toy(operator_set=operator_set), tmp_path / "foreign.onnx")
        source = adopt(tmp_path / "foreign.onnx", tmp_path / "adopted.onnx", AdoptionOptions()).path
    report = quantize_int8(source, tmp_path / "int8.onnx", sorted(adopted.parent.glob("*.png")))
    assert [layer.precision for layer in report.layers] == ["int8"] * 3
    onnx.checker.check_model(onnx.load(tmp_path / "int8.onnx"), full_check=True)
    np.testing.assert_allclose(scores(tmp_path / "int8.onnx"), scores(source), atol=0.1)
