"""How the names that a forward pass gives its stages reach the exported file.

`asag.detector.stage` is an op while a model is exported. It becomes a node here, and the node becomes the name of the
value that went in, so that it costs the finished graph nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op

import asag.detector  # noqa: F401 (registers `torch.ops.asag.stage`)
from asag.export.op_bodies.domain import DOMAIN_VERSION, asag_opset
from asag.family import Stage
from asag.trt_plugins.operations import DOMAIN

_OPERATOR = "Stage"


def stage_translation() -> dict[Callable[..., Any], Callable[..., Any]]:
    """`torch.ops.asag.stage` -> what emits its node, for the exporter's `custom_translation_table`."""
    types = ["tensor(float)", "tensor(float16)", "tensor(bool)", "tensor(int32)", "tensor(int64)"]
    schema = OpSchema(
        _OPERATOR,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[OpSchema.FormalParameter("value", "T")],
        outputs=[OpSchema.FormalParameter("same", "T")],
        type_constraints=[("T", types, "type of the value")],
        attributes=[OpSchema.Attribute("name", OpSchema.AttrType.STRING)],
    )
    node = Op(asag_opset, _OPERATOR, schema)
    return {torch.ops.asag.stage.default: lambda value, name: node(value, name=name)}


def name_stages(graph: onnx.GraphProto, stages: Sequence[Stage]) -> None:
    """Put the marks' names in the place of the values that they mark, and take the marks out, in place.

    Raises ValueError when a value that `stages` declares as exported is not there, or has two names.
    """
    made = {output for node in graph.node for output in node.output}
    names: dict[str, str] = {}
    marks = [node for node in graph.node if (node.domain, node.op_type) == (DOMAIN, _OPERATOR)]
    for mark in marks:  # in the order of computation
        wanted = mark.attribute[0].s.decode()
        value = mark.input[0]
        if value in names:
            raise ValueError(f"the values {names[value]} and {wanted} of the stages are one: name it once")
        if value not in made:
            raise ValueError(f"the value {wanted} of a stage is a constant or an input of the model")
        names[value] = names[mark.output[0]] = wanted
    kept = [node for node in graph.node if (node.domain, node.op_type) != (DOMAIN, _OPERATOR)]
    for node in kept:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    del graph.node[:]
    graph.node.extend(kept)
    replaced = {mark.output[0] for mark in marks}
    values = [value for value in graph.value_info if value.name not in replaced]
    for value in values:
        value.name = names.get(value.name, value.name)
    del graph.value_info[:]
    graph.value_info.extend(values)
    found = {output for node in graph.node for output in node.output}
    lost = [name for stage in stages for name in stage.value_names() if name not in found]
    if lost:
        raise ValueError(
            f"the stages declare {', '.join(lost)}, which the exported graph does not have: is it named in the forward"
            " pass, and is what `stage` returns used further on?"
        )
