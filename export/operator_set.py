"""Raising the operator set of a file, where that changes no operator in it but for further types.

`onnx.version_converter` drops model-local functions, which hold the bodies of the ops of domain `asag`; so the number
is raised here, after a look at every operator used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx
from onnx import defs

STANDARD_DOMAINS = ("", "ai.onnx")

REWORDED = ("MaxPool",)
"""Operators whose description alone changed up to operator set 22: MaxPool's tells more of `ceil_mode`, which no
export uses.
"""


def raise_operator_set(proto: onnx.ModelProto, version: int) -> None:
    """Set the standard operator set of `proto` and of its functions to `version`, in place.

    Raises ValueError naming an operator that means something else in `version` than in the set that the file has, or
    where the file has a later set already.
    """
    graphs = [(proto, proto.graph.node), *((function, function.node) for function in proto.functions)]
    for owner, nodes in graphs:
        for entry in owner.opset_import:
            if entry.domain not in STANDARD_DOMAINS:
                continue
            if entry.version > version:
                raise ValueError(f"the file has operator set {entry.version}, later than {version}")
            changed = sorted(name for name in operators(nodes) if not is_widened(name, entry.version, version))
            if changed:
                raise ValueError(
                    f"operator {changed[0]} differs between operator sets {entry.version} and {version}: the file"
                    " cannot be raised"
                )
            entry.version = version


def standard_operator_set(proto: onnx.ModelProto) -> int:
    """The number of the standard operator set of a file; 0 where it names none."""
    return next((entry.version for entry in proto.opset_import if entry.domain in STANDARD_DOMAINS), 0)


def operators(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Types of the standard operators among `nodes` and in the graphs inside them."""
    return {node.op_type for node in _all_nodes(nodes) if node.domain in STANDARD_DOMAINS}


def is_widened(operator: str, old: int, new: int) -> bool:
    """Whether operator set `new` gives the operator nothing but more types than `old`: same attributes and defaults,
    same inputs and outputs, same description.
    """
    before, after = defs.get_schema(operator, old), defs.get_schema(operator, new)
    if before.since_version == after.since_version:
        return True
    types_before, types_after = _types(before), _types(after)
    return (
        _signature(before) == _signature(after)
        and types_before.keys() == types_after.keys()
        and all(types <= types_after[name] for name, types in types_before.items())
        and (before.doc == after.doc or operator in REWORDED)
    )


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _all_nodes(attribute.g.node)
            for graph in attribute.graphs:
                yield from _all_nodes(graph.node)


def _types(schema: defs.OpSchema) -> dict[str, set[str]]:
    return {each.type_param_str: set(each.allowed_type_strs) for each in schema.type_constraints}


def _signature(schema: defs.OpSchema) -> tuple[Any, ...]:
    attributes = {
        name: (each.type, each.required, each.default_value.SerializeToString())
        for name, each in schema.attributes.items()
    }
    values = [
        [(each.name, each.type_str, each.option, each.is_homogeneous) for each in side]
        for side in (schema.inputs, schema.outputs)
    ]
    return attributes, values
