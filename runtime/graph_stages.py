"""Which part of the network each node of an exported model belongs to.

A node belongs to the first stage that needs it: ``backbone+neck`` is what P2..P5 come from (with the normalization of
the pixels), ``anchors`` what the sparse anchors come from, ``proposals`` what the layers named ``detector.proposals.``
come from, and ``head`` the rest, down to the best detections. The few element-wise steps that turn the proposals' last
layer into boxes count as head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NETWORK_STAGES = ("backbone+neck", "anchors", "proposals", "head")
"""In the order of computation."""

PROPOSAL_PARAMETERS = "detector.proposals."

DOMAIN = "asag"
"""Of the custom ops."""


def stage_ends(graph: Any) -> dict[str, set[str]]:
    """The values that each stage but the head ends with, by name, in an exported graph whose ops are not inlined.

    Inlining keeps these names. Raises ValueError for a graph that is no export of this project.
    """
    gather, pyramid = first_op(graph.node, "GatherAnchors"), first_op(graph.node, "PyramidRoIAlign")
    parameters = {tensor.name for tensor in graph.initializer if tensor.name.startswith(PROPOSAL_PARAMETERS)}
    proposals: set[str] = set()
    for node in graph.node:
        if parameters & set(node.input):
            proposals.update(node.output)
            parameters -= set(node.input)  # an exporter gives equal tensors one name: later readers are the head's
    return {
        "backbone+neck": set(pyramid.input[:4]),
        "anchors": set(gather.output),
        "proposals": proposals,
    }


def first_op(nodes: Iterable[Any], op_type: str) -> Any:
    """The first node of a custom op; ValueError where there is none."""
    for node in nodes:
        if (node.domain, node.op_type) == (DOMAIN, op_type):
            return node
    raise ValueError(f"not an asag model: its graph has no op {op_type}; export it again with `asag export`")


def node_stages(nodes: Sequence[Any], ends: Mapping[str, Iterable[str]]) -> list[str]:
    """The stage of each node, in their order; ``ends`` as :func:`stage_ends` gives them."""
    producer = {output: index for index, node in enumerate(nodes) for output in node.output if output}
    found: list[str | None] = [None] * len(nodes)
    for stage, values in ends.items():
        pending = list(values)
        while pending:
            index = producer.get(pending.pop())
            if index is not None and found[index] is None:
                found[index] = stage
                pending.extend(values_read(nodes[index]))
    return [stage or NETWORK_STAGES[-1] for stage in found]


def values_read(node: Any) -> list[str]:
    """The values that a node reads, those of the graphs inside it included."""
    inside = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    nested = [name for graph in inside for inner in graph.node for name in values_read(inner)]
    return [name for name in (*node.input, *nested) if name]
