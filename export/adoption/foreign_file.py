"""Reading a file that another tool exported, and saying in one line what stands in the way of adopting it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner

from asag.export.adoption.graph import all_graphs, mend
from asag.export.adoption.layouts import Port, graph_inputs, ports
from asag.export.adoption.self_description import SelfDescription, self_description
from asag.export.adoption.widening import widen
from asag.export.operator_set import STANDARD_DOMAINS, standard_operator_set
from asag.runtime.errors import one_line
from asag.runtime.metadata import PROPERTY_PREFIX

ATTENTION = ("", "Attention")
"""Of operator set 23: TensorRT-RTX 1.7 does not build it in float32, but what the standard says it is made of."""

OLDEST, NEWEST = 16, 23
"""Operator sets that the ops' bodies can be in."""


@dataclass(frozen=True)
class ForeignFile:
    """A foreign file in float32, its functions and Attention inlined; ``digest`` is the SHA-256 of its bytes.

    ``half`` is the file with its own types, where it computes in 16 bits; ``said`` is what it says of itself.
    """

    path: Path
    proto: onnx.ModelProto
    digest: str
    operator_set: int
    half: onnx.ModelProto | None
    said: SelfDescription

    @property
    def inputs(self) -> tuple[Port, ...]:
        """What it is fed."""
        return graph_inputs(self.proto.graph)

    @property
    def outputs(self) -> tuple[Port, ...]:
        """What it gives."""
        return ports(self.proto.graph.output)


def read_foreign(path: Path) -> ForeignFile:
    """Read a file to adopt.

    Raises FileNotFoundError for a missing file, and ValueError for one that is damaged, an asag model already, of an
    operator set without bodies, or with operators that nobody defines.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model not found: {path}")
    try:
        proto = onnx.load(path)
        mend(proto.graph)
        onnx.checker.check_model(proto)
    except Exception as error:  # protobuf, onnx and its checker raise classes of their own
        raise ValueError(f"cannot read {path} as ONNX, export it again: {one_line(error)}") from None
    if any(entry.key.startswith(PROPERTY_PREFIX) for entry in proto.metadata_props):
        raise ValueError(f"{path} is an asag model already")
    said = self_description(proto)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    if any(node.op_type == ATTENTION[1] and node.domain in STANDARD_DOMAINS for node in proto.graph.node):
        proto = onnx.inliner.inline_selected_functions(proto, [ATTENTION], inline_schema_functions=True)
    half = widen(proto)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        return ForeignFile(path, proto, digest, _operator_set(proto), half, said)
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def _operator_set(proto: onnx.ModelProto) -> int:
    for graph in all_graphs(proto.graph):
        for node in graph.node:
            if node.domain not in STANDARD_DOMAINS:
                raise ValueError(
                    f"operator {node.op_type} of domain {node.domain} has no body; export it with standard operators"
                )
    version = standard_operator_set(proto)
    if version < OLDEST:
        raise ValueError(f"operator set {version} is too old; export with {OLDEST} or later")
    if version > NEWEST:
        raise ValueError(f"operator set {version} is too new; export with {NEWEST} or earlier")
    return version


def fix_sides(proto: onnx.ModelProto, inputs: Iterable[Port]) -> None:
    """Give inputs the sides of these that are not open, in place. What was inferred of shapes before goes."""
    sides = {port.name: port.dims for port in inputs}
    for value in proto.graph.input:
        for dimension, side in zip(value.type.tensor_type.shape.dim, sides.get(value.name, ()), strict=False):
            if side is not None:
                dimension.dim_value = side
    del proto.graph.value_info[:]
