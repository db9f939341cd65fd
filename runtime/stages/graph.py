"""Which part of the network each node of an exported model belongs to.

A node belongs to the first part whose values come from it, by the names that the forward pass gave them; what no named
value needs makes the detections of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from asag.runtime.metadata import ModelMetadata

DETECTIONS = "detections"
"""What follows the last stage: scores, and the best of them."""

HALF_ENDING = "_half"
"""How a value's twin in half precision is called."""


def network_parts(metadata: ModelMetadata) -> tuple[str, ...]:
    """The parts that the stages of a model are timed as, in order, and the rest."""
    return (*metadata.parts, DETECTIONS)


def shown_values(names: Iterable[str], present: Collection[str]) -> dict[str, str]:
    """The values of the stages that a graph has, by name: each as it stands or as its twin in half precision.

    present: names of all values that the graph's nodes make.
    """
    found = {}
    for name in names:
        if name in present:
            found[name] = name
        elif f"{name}{HALF_ENDING}" in present:
            found[name] = f"{name}{HALF_ENDING}"
    return found


def made_by(nodes: Iterable[Any]) -> set[str]:
    """Names of the values that nodes make."""
    return {output for node in nodes for output in node.output if output}


def part_ends(nodes: Sequence[Any], metadata: ModelMetadata) -> dict[str, set[str]]:
    """The values that each part but the last ends with, in a graph whether its ops are inlined or not.

    What a part computes in half precision is cast by those who want it in float32. Raises ValueError where the graph
    has none of a part's values.
    """
    made = made_by(nodes)
    cast_from = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Cast"}
    ends = {}
    for part, names in metadata.parts.items():
        values = shown_values(names, made).values()
        ends[part] = {cast_from[v] if cast_from.get(v) == f"{v}{HALF_ENDING}" else v for v in values}
    missing = [part for part, values in ends.items() if not values]
    if missing or not ends:
        which = f"the values of {missing[0]}" if missing else "its stages"
        raise ValueError(f"the graph does not name {which}; export it again with `asag export`")
    return ends


def node_parts(nodes: Sequence[Any], ends: Mapping[str, Iterable[str]]) -> list[str]:
    """The part of each node, in their order; ``ends`` as :func:`part_ends` gives them."""
    producer = {output: index for index, node in enumerate(nodes) for output in node.output if output}
    found: list[str | None] = [None] * len(nodes)
    for part, values in ends.items():
        pending = list(values)
        while pending:
            index = producer.get(pending.pop())
            if index is not None and found[index] is None:
                found[index] = part
                pending.extend(values_read(nodes[index]))
    return [part or DETECTIONS for part in found]


def values_read(node: Any) -> list[str]:
    """The values that a node reads, those of the graphs inside it included."""
    inside = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    nested = [name for graph in inside for inner in graph.node for name in values_read(inner)]
    return [name for name in (*node.input, *nested) if name]
