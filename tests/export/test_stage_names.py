"""The names that a forward pass gives its stages, in the exported graph."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.torch_version import TorchVersion

from asag.export.stage_names import name_stages
from asag.family import Stage, Value
from tests.exports import small_export

STAGES = (
    Stage("features", (Value("p2", "maps"),)),
    Stage("head", (Value("boxes", "boxes"), Value("shown", "scores", exported=False))),
)


LEFT_BY_OLDER_EXPORTERS = 20 if TorchVersion(torch.__version__) < "2.14" else 0
"""Nodes that the exporter of an older PyTorch does not simplify away."""


def graph_of(*nodes: tuple[str, str, str]) -> onnx.GraphProto:
    """A graph from `x` to `y` of (operator, input, output); an operator with a slash is the mark of that name."""
    made = []
    for operator, source, target in nodes:
        made.append(helper.make_node(operator, [source], [target]))
        if "/" in operator:
            made[-1].op_type, made[-1].domain = "Stage", "asag"
            made[-1].attribute.append(helper.make_attribute("name", operator))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    inside = [helper.make_tensor_value_info(target, TensorProto.FLOAT, [1]) for _, _, target in nodes if target != "y"]
    return helper.make_graph(made, "marked", ends[:1], ends[1:], value_info=inside)


WHOLE = (
    ("Abs", "x", "a"),
    ("features/p2", "a", "b"),
    ("Exp", "b", "c"),
    ("Neg", "a", "d"),
    ("head/boxes", "c", "e"),
    ("Relu", "e", "y"),
)


def test_marks_become_names() -> None:
    graph = graph_of(*WHOLE)
    name_stages(graph, STAGES)
    assert [(node.op_type, list(node.input), list(node.output)) for node in graph.node] == [
        ("Abs", ["x"], ["features/p2"]),
        ("Exp", ["features/p2"], ["head/boxes"]),
        ("Neg", ["features/p2"], ["d"]),  # who read the value before its mark reads the same
        ("Relu", ["head/boxes"], ["y"]),
    ]
    assert {value.name for value in graph.value_info} == {"features/p2", "head/boxes", "d"}


def test_a_value_that_did_not_survive() -> None:
    with pytest.raises(ValueError, match="declare head/boxes, which the exported graph does not have: is it named"):
        name_stages(graph_of(*WHOLE[:-2], ("Relu", "c", "y")), STAGES)


def test_a_value_with_two_names() -> None:
    with pytest.raises(ValueError, match="the values features/p2 and head/boxes of the stages are one: name it once"):
        name_stages(graph_of(("Abs", "x", "a"), ("features/p2", "a", "b"), ("head/boxes", "a", "y")), STAGES)


def test_the_mark_of_a_mark_is_a_second_name() -> None:
    with pytest.raises(ValueError, match="the values features/p2 and head/boxes of the stages are one: name it once"):
        name_stages(graph_of(("Abs", "x", "a"), ("features/p2", "a", "b"), ("head/boxes", "b", "y")), STAGES)


def test_a_mark_on_an_input() -> None:
    with pytest.raises(ValueError, match="the value features/p2 of a stage is a constant or an input of the model"):
        name_stages(graph_of(("features/p2", "x", "a"), ("Abs", "a", "y")), STAGES)


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "most_nodes"), [("adamixer", 578), ("sparse_rcnn", 535), ("deformable", 914)])
def test_an_exported_graph_has_every_value_that_is_declared(decoder: str, most_nodes: int) -> None:
    exported = small_export(decoder)
    nodes = exported.proto.graph.node
    made = {output for node in nodes for output in node.output}
    assert made >= {name for stage in exported.metadata.stages for name in stage.value_names()}
    assert "Stage" not in {node.op_type for node in nodes}
    assert len(nodes) <= most_nodes + LEFT_BY_OLDER_EXPORTERS
