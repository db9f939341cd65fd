"""Files of schema 1, which named no family, no choices and no stages: what was true of all of them, as data.

They hold detectors of one family, whose graphs tell two stages by their ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asag.family import Stage, Value

_FAMILY = "asag"
_CHOICES = ("head", "levels", "patch_capacity")
_HALF_LAYERS = ("roi_projection", "parameters_of_query", "out_projection", "feed_forward.mlp")
_STAGES = (
    Stage("features", tuple(Value(f"p{level}", "maps") for level in (2, 3, 4, 5))),
    Stage("anchors", (Value("boxes", "boxes"), Value("valid", "valid")), aligns=True),
)
_MARKED_BY = {
    "features": ("PyramidRoIAlign", "input", (0, 1, 2, 3)),
    "anchors": ("GatherAnchors", "output", (0, 1)),
}
"""Of each stage: the first op of this type has its values among its inputs or outputs, in these places."""


def upgraded_metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of schema 1 as those of schema 2; what is missing stays so."""
    known = {name: value for name, value in values.items() if name not in _CHOICES}
    added = {"family": _FAMILY, "stages": _STAGES, "half_layers": _HALF_LAYERS, "schema": 2}
    if all(name in values for name in _CHOICES):
        added["choices"] = {name: values[name] for name in _CHOICES}
    return known | added


def name_values(graph: Any) -> None:
    """Give the values of the stages, in a graph of schema 1, the names that they would have today, in place.

    graph: an `onnx.GraphProto` whose ops of domain `asag` are not inlined. Raises ValueError where an op is missing
    or damaged.
    """
    names: dict[str, str] = {}
    for stage in _STAGES:
        op_type, side, places = _MARKED_BY[stage.name]
        node = next((node for node in graph.node if (node.domain, node.op_type) == ("asag", op_type)), None)
        if node is None:
            raise ValueError(f"not an asag model: its graph has no op {op_type}; export it again with `asag export`")
        values = list(getattr(node, side))
        if len(values) <= max(places) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"its op {op_type} is damaged; export it again with `asag export`")
        for place, wanted in zip(places, stage.value_names(), strict=True):
            found = values[place]
            names[found] = f"{wanted}_half" if found.endswith("_half") else wanted
            if found.endswith("_half"):
                names[found.removesuffix("_half")] = wanted
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
