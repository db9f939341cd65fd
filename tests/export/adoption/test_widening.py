"""Files in 16 bits, and files that converters to float16 leave broken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from asag.export.adoption.adopt import adopt
from asag.export.adoption.execution import FileRun
from asag.export.adoption.foreign_file import read_foreign
from asag.export.adoption.graph import all_graphs
from asag.export.adoption.plan import AdoptionOptions
from asag.export.adoption.widening import widen
from tests.export.adoption.toy_peers import make_toy

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
HALVES = {TensorProto.FLOAT16, TensorProto.BFLOAT16}


def types(proto: onnx.ModelProto) -> Iterator[int]:
    """Of all that a file says a type of, and of what inference finds."""
    known = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    for graph in all_graphs(known.graph):
        yield from (tensor.data_type for tensor in graph.initializer)
        yield from (value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info))
        for node in graph.node:
            yield from (attribute.i for attribute in node.attribute if attribute.name == "to")
            yield from (attribute.t.data_type for attribute in node.attribute if attribute.HasField("t"))


@pytest.fixture
def classes(tmp_path: Path) -> str:
    path = tmp_path / "classes.txt"
    path.write_text("\n".join("abcde"))
    return str(path)


@pytest.mark.parametrize("layout", ["rtdetr", "masked", "ultralytics"])
def test_a_detector_in_float16(layout: str, tmp_path: Path, classes: str) -> None:
    """As `.half()` before the export makes it: inputs, outputs and places of samples are in float16, too."""
    proto = make_toy(layout, half=True)
    assert HALF in {value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)}
    onnx.save(proto, tmp_path / "half.onnx")
    report = adopt(tmp_path / "half.onnx", tmp_path / "adopted.onnx", AdoptionOptions(classes=classes))
    assert report.metadata.replaced == {"MultiScaleDeformableAttention": 2}
    assert report.metadata.precision == "fp32"
    assert not HALVES & set(types(onnx.load(report.path)))
    (warning,) = report.warnings
    count = f"{report.comparison.detections:,}"
    assert f"the file computes in 16 bits, the adopted one in float32; {count} of {count} detections in" in warning


def test_a_file_that_no_runtime_takes_in_float16(tmp_path: Path) -> None:
    """Converters leave casts to float32 where all around is float16."""
    proto = make_toy(half=True)
    graph = proto.graph
    place = next(place for place, node in enumerate(graph.node) if node.op_type == "Relu")
    graph.node[place].output[0], relu = "wide", graph.node[place].output[0]
    graph.node.insert(place + 1, helper.make_node("Cast", ["wide"], [relu], to=FLOAT))
    graph.value_info.append(helper.make_tensor_value_info(relu, HALF, None))
    with pytest.raises(ValueError, match="ONNX Runtime cannot open it"):
        FileRun(proto)
    onnx.save(proto, tmp_path / "half.onnx")
    report = adopt(tmp_path / "half.onnx", tmp_path / "adopted.onnx", AdoptionOptions())
    assert report.comparison.found == report.comparison.detections > 100
    assert report.warnings[0].endswith("does not match expected type (tensor(float)).")
    assert "not compared, since in 16 bits ONNX Runtime cannot open it" in report.warnings[0]


def test_every_place_that_names_a_type() -> None:
    def half(number: float, name: str) -> TensorProto:
        return numpy_helper.from_array(np.array([number], np.float16), name)

    def branch(number: float) -> onnx.GraphProto:
        node = helper.make_node("Add", ["sum", "inner"], ["chosen"])
        value = helper.make_tensor_value_info("chosen", HALF, [1])
        return helper.make_graph([node], "branch", [], [value], [half(number, "inner")])

    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=HALF),
        helper.make_node("Constant", [], ["b"], value=half(0.25, "b")),
        helper.make_node("ConstantOfShape", ["shape"], ["c"], value=half(0.5, "c")),
        helper.make_node("Cast", ["brain"], ["d"], to=HALF),
        helper.make_node("Sum", ["a", "b", "c", "d"], ["sum"]),
        helper.make_node("If", ["yes"], ["either"], then_branch=branch(2), else_branch=branch(3)),
        helper.make_node("Cast", ["either"], ["wide"], to=FLOAT),
        helper.make_node("Cast", ["wide"], ["y"], to=FLOAT),
    ]
    weights = [
        numpy_helper.from_array(np.array([1], np.int64), "shape"),
        numpy_helper.from_array(np.array(True), "yes"),
        helper.make_tensor("brain", TensorProto.BFLOAT16, [1], [0.125]),
    ]
    x, y = (helper.make_tensor_value_info(name, FLOAT, [1]) for name in "xy")
    graph = helper.make_graph(nodes, "graph", [x], [y], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert widen(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert not HALVES & set(types(proto))
    assert [node.op_type for node in proto.graph.node].count("Cast") == 1  # its value is the output
    found = FileRun(proto).run({"x": np.array([1 / 3], np.float32)})["y"]
    assert found == pytest.approx(1 / 3 + 2.875, abs=1e-6)  # a third in float16 is 8e-5 away
    assert widen(proto) is None


def test_nodes_in_disorder_and_nodes_and_names_twice(tmp_path: Path) -> None:
    proto = make_toy()
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed([*nodes, nodes[3]]))
    for node in proto.graph.node:
        node.name = "node"
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(proto)
    onnx.save(proto, tmp_path / "foreign.onnx")
    report = adopt(tmp_path / "foreign.onnx", tmp_path / "adopted.onnx", AdoptionOptions())
    assert report.comparison.found == report.comparison.detections > 100
    proto.graph.node[-1].input[0] = proto.graph.output[0].name
    onnx.save(proto, tmp_path / "circle.onnx")
    with pytest.raises(ValueError, match=r"cannot read .*circle.onnx as ONNX, export it again: nodes read each other"):
        read_foreign(tmp_path / "circle.onnx")
