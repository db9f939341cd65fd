"""Which files are recognised, and what is said of those that are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from asag.cli.adopt import LAYOUTS, adopt
from asag.cli.inspect import inspect
from asag.export.adoption.execution import FileRun
from asag.export.adoption.foreign_file import read_foreign
from asag.export.adoption.layouts import LAYOUT_NAMES, Port, recognise
from asag.export.adoption.outlook import outlook
from asag.export.adoption.plan import read_classes
from tests.export.adoption.toy_peers import make_toy

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
IMAGES = Port("images", FLOAT, (None, 3, 64, 64))


def rows(columns: int | None) -> tuple[Port, ...]:
    return (Port("output0", FLOAT, (None, 300, columns)),)


def test_the_command_knows_every_layout() -> None:
    assert LAYOUTS == LAYOUT_NAMES


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ((IMAGES,), rows(6), "six columns are a score and a class, or two classes; choose --layout"),
        ((IMAGES,), rows(4), "inputs images .* and outputs output0 .* are no known layout; name one with --layout"),
        ((Port("x", FLOAT, (1, 64, 64)),), rows(9), "are no known layout"),
        ((Port("images", FLOAT, (1, 4, 64, 64)),), rows(9), "are no known layout"),
        ((IMAGES,), (*rows(9), Port("masks", FLOAT, (None, 300, 16, 16))), "masks are not supported"),
        ((IMAGES,), (*rows(9), Port("keypoints", FLOAT, (None, 300, 17, 3))), "keypoints are not supported"),
    ],
)
def test_what_is_no_layout(inputs: tuple[Port, ...], outputs: tuple[Port, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recognise(inputs, outputs)


def test_a_named_layout_takes_other_names() -> None:
    outputs = (
        Port("classes", INT64, (None, 300)),
        Port("corners", FLOAT, (None, 300, 4)),
        Port("confidence", FLOAT, (None, 300)),
    )
    inputs = (Port("x", FLOAT, (None, 3, 64, 64)), Port("extent", INT64, (None, 2)))
    with pytest.raises(ValueError, match=r"no known layout"):
        recognise(inputs, outputs)
    found = recognise(inputs, outputs, "rtdetr")
    assert {role: port.name for role, port in found.outputs.items()} == {
        "labels": "classes",
        "boxes": "corners",
        "scores": "confidence",
    }
    with pytest.raises(ValueError, match=r"are not those of layout rfdetr"):
        recognise(inputs, outputs, "rfdetr")


def test_a_mask_tells_detr_and_its_kin() -> None:
    outputs = Port("logits", FLOAT, (None, 100, 92)), Port("pred_boxes", FLOAT, (None, 100, 4))
    pixels, mask = Port("pixel_values", FLOAT, (None, 3, 64, 64)), Port("pixel_mask", INT64, (None, 64, 64))
    plain, masked = recognise((pixels,), outputs), recognise((pixels, mask), outputs)
    assert (plain.normalization, plain.resize) == ("unit", "stretch")
    assert (masked.normalization, masked.resize) == ("imagenet", "fit")


def test_others_give_what_detr_gives() -> None:
    boxes = Port("boxes", FLOAT, (None, 100, 4))
    assert recognise((IMAGES,), (Port("logits", FLOAT, (None, 100, 3)), boxes)).layout.name == "transformers"
    boxes = Port("pred_boxes", FLOAT, (None, 100, 4))
    assert recognise((IMAGES,), (Port("pred_logits", FLOAT, (None, 100, 3)), boxes)).layout.name == "transformers"


def test_classes(tmp_path: Path) -> None:
    assert read_classes("coco80", 80).ids[:12] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13)
    wide = read_classes("coco91", 91)
    assert (len(wide.columns), len(wide.ids), wide.columns[12], wide.columns[13]) == (91, 80, None, 13)
    with pytest.raises(
        ValueError, match=r"the head tells 80 classes apart, and coco91 has 80; likely --classes coco80"
    ):
        read_classes("coco91", 80)
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    assert read_classes(str(tmp_path / "names.txt"), 2).names == {0: "cat", 1: "dog"}
    with pytest.raises(ValueError, match=r"the head tells 1 classes apart, and .*names.txt has 2"):
        read_classes(str(tmp_path / "names.txt"), 1)
    with pytest.raises(ValueError, match=r"tells 3 classes apart, and .* has 2; .* --activation softmax"):
        read_classes(str(tmp_path / "names.txt"), 3)
    (tmp_path / "names.txt").write_text("cat\nN/A\ndog\nN/A\n")
    for columns in (4, None):
        classes = read_classes(str(tmp_path / "names.txt"), columns)
        assert (classes.columns, classes.names) == ((0, None, 2, None), {0: "cat", 2: "dog"})
    with pytest.raises(FileNotFoundError, match=r"no such file of classes: .*; or say coco80 or coco91"):
        read_classes(str(tmp_path / "none.txt"), 2)


def graph_of(node: onnx.NodeProto, operator_set: int = 17) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, FLOAT, [1, 3, 8, 8]) for name in ("images", "output0")]
    graph = helper.make_graph([node], "graph", values[:1], values[1:])
    sets = [helper.make_opsetid("", operator_set), helper.make_opsetid("elsewhere", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=8)


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (graph_of(helper.make_node("Relu", ["images"], ["output0"]), 15), "operator set 15 is too old; export with 16"),
        (graph_of(helper.make_node("Relu", ["images"], ["output0"]), 24), "operator set 24 is too new"),
        (
            graph_of(helper.make_node("Glow", ["images"], ["output0"], domain="elsewhere")),
            "operator Glow of domain elsewhere has no body",
        ),
    ],
)
def test_files_that_cannot_be_adopted(proto: onnx.ModelProto, message: str, tmp_path: Path) -> None:
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match=message):
        read_foreign(tmp_path / "foreign.onnx")


def test_damaged_and_missing_files_and_our_own(tmp_path: Path) -> None:
    proto = make_toy()
    whole = proto.SerializeToString()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*cut.onnx as ONNX, export it again"):
        read_foreign(tmp_path / "cut.onnx")
    with pytest.raises(FileNotFoundError, match=r"model not found"):
        read_foreign(tmp_path / "none.onnx")
    proto.metadata_props.add(key="asag.family", value='"asag"')
    onnx.save(proto, tmp_path / "ours.onnx")
    with pytest.raises(ValueError, match=r"ours.onnx is an asag model already"):
        read_foreign(tmp_path / "ours.onnx")


def test_inspect_says_how_to_adopt(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    onnx.save(make_toy("rtdetr"), path)
    facts, command = outlook(path)
    assert facts["layout"] == "rtdetr (RT-DETR, D-FINE, DEIM)"
    assert facts["deformable attentions"] == "2 by their form, with 6 of 6 GridSample"
    assert command == f"asag adopt {path} -o foreign-adopted.onnx --classes FILE"
    result = CliRunner().invoke(inspect, [str(path)])
    assert result.exit_code == 0
    assert f"adopt it: {command}" in result.output


def test_inspect_knows_what_a_run_will_tell_and_has_no_command_for_masks(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    proto = make_toy("ultralytics")
    proto.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "columns"
    onnx.save(proto, path)
    facts, command = outlook(path)
    assert facts["layout"] == "output0 [?, ?, ?] leaves its columns open; adoption runs it and sees them"
    assert command == f"asag adopt {path} -o foreign-adopted.onnx"
    proto.graph.node.add(op_type="Identity", input=[proto.graph.output[0].name], output=["masks"])
    proto.graph.output.add(name="masks", type=proto.graph.output[0].type)
    onnx.save(proto, path)
    facts, command = outlook(path)
    assert facts["layout"].startswith("masks are not supported")
    assert command is None


def test_attention_is_spelled_out(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, FLOAT, [1, 2, 5, 4]) for name in ("query", "key", "value", "result")]
    node = helper.make_node("Attention", ["query", "key", "value"], ["result"])
    proto = helper.make_model(
        helper.make_graph([node], "graph", values[:3], values[3:]),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    onnx.save(proto, tmp_path / "foreign.onnx")
    spelled_out = read_foreign(tmp_path / "foreign.onnx").proto
    assert "Attention" not in {inner.op_type for inner in spelled_out.graph.node}
    feeds = {value.name: np.random.default_rng(0).normal(size=(1, 2, 5, 4)).astype(np.float32) for value in values[:3]}
    results = [FileRun(one).run(feeds)["result"] for one in (proto, spelled_out)]
    np.testing.assert_allclose(*results, atol=1e-6)


def test_ranked_detections_need_classes(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    onnx.save(make_toy("rtdetr"), path)
    result = CliRunner().invoke(adopt, [str(path), "-o", str(tmp_path / "adopted.onnx")])
    assert "ranked detections do not tell the classes; give --classes (5 of them)" in str(result.exception)
    (tmp_path / "two.txt").write_text("a\nb")
    with_two = [str(path), "-o", str(tmp_path / "adopted.onnx"), "--classes", str(tmp_path / "two.txt")]
    assert "a detection has a class beyond the 2 of --classes" in str(CliRunner().invoke(adopt, with_two).exception)
    assert not (tmp_path / "adopted.onnx").exists()
