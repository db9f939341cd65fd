"""Layers of an engine after fusion: by kernel, by element type, what was fused, and the memory they take.

The builder says this at the end of a build, on any machine, in the words that an engine's inspector uses where a GPU
opens the engine.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]

LONGEST = 8
"""Operators that are named of one fused layer; the rest are counted."""

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)$", re.MULTILINE)
_RESULT = re.compile(r"Outputs: \[ \{ .*?Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PROFILE = re.compile(r" \[profile \d+\]")
_MEMORY = re.compile(r"^Total (Activation|Weights) Memory: (\d+) bytes")


@dataclasses.dataclass(frozen=True)
class EngineLayers:
    """What a builder made of a network; of all profiles together.

    ``kernels`` counts layers by the kind of kernel that runs them, ``types`` by the element type of their first result.
    ``fused`` has a row (kind of kernel, operators, count) for layers that stand for several of the ONNX file's nodes; a
    fusion that every profile repeats counts once. ``activation_bytes`` is what a context of each profile needs on the
    GPU for intermediate results, ``weight_bytes`` the weights; empty and 0 where the builder did not say.
    """

    kernels: dict[str, Count]
    types: dict[str, Count]
    fused: tuple[tuple[str, str, Count], ...]
    activation_bytes: tuple[Count, ...]
    weight_bytes: Count


class BuildMessages:
    """Takes a builder's messages one by one and keeps what they say about the finished engine.

    ``lines`` has all of them, as "severity: text", where ``keep_all`` is set.
    """

    def __init__(self, keep_all: bool = False) -> None:
        self.lines: list[str] = []
        self._keep_all = keep_all
        self._layers: list[dict[str, Any]] = []
        self._activations: list[int] = []
        self._weights = 0

    def __call__(self, severity: str, message: str) -> None:
        """Take one message."""
        if self._keep_all:
            self.lines.append(f"{severity}: {' '.join(message.split())}")
        if "LayerType: " in message:
            self._layers = described_layers(message)
        if found := _MEMORY.match(message):
            if found[1] == "Weights":
                self._weights = int(found[2])
            else:
                self._activations.append(int(found[2]))

    def engine_layers(self, operators: Mapping[str, str]) -> EngineLayers | None:
        """The finished engine's layers, or None where the builder did not list them; see :func:`summarize`."""
        if not self._layers:
            return None
        summary = summarize(self._layers, operators)
        return dataclasses.replace(summary, activation_bytes=tuple(self._activations), weight_bytes=self._weights)


def described_layers(message: str) -> list[dict[str, Any]]:
    """A builder's list of layers, one per line, as the objects that an engine's inspector gives."""
    layers = []
    for found in _LAYER.finditer(message):
        rest = found["rest"]
        result = _RESULT.search(rest)
        outputs = [{"Datatype": result[1]}] if result else []
        metadata = rest.rpartition("Metadata: ")[2]
        layers.append({"Name": found["name"], "LayerType": found["kind"], "Outputs": outputs, "Metadata": metadata})
    return layers


def summarize(layers: Sequence[Any], operators: Mapping[str, str]) -> EngineLayers:
    """Count layers; an entry is an inspector's object, or no more than a name. ``operators`` gives the ONNX nodes'."""
    described = [layer if isinstance(layer, Mapping) else {"Name": str(layer)} for layer in layers]
    kernels = Counter(_kernel(layer) for layer in described)
    types = Counter(kind for layer in described if (kind := _result_type(layer)))
    fusions = {(_kernel(layer), nodes) for layer in described if len(nodes := _nodes(layer)) > 1}
    fused = Counter((kernel, _operators(nodes, operators)) for kernel, nodes in sorted(fusions))
    rows = tuple((kernel, text, count) for (kernel, text), count in fused.most_common())
    return EngineLayers(dict(kernels.most_common()), dict(types.most_common()), rows, (), 0)


def _kernel(layer: Mapping[str, Any]) -> str:
    return str(layer.get("LayerType", "not said"))


def _result_type(layer: Mapping[str, Any]) -> str:
    outputs = layer.get("Outputs")
    if not isinstance(outputs, list) or not outputs or not isinstance(outputs[0], Mapping):
        return ""
    return str(outputs[0].get("Datatype", "")).lower()


def _nodes(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the ONNX nodes that a layer stands for, without the number of its profile."""
    names = _NODE.findall(str(layer.get("Metadata", ""))) or str(layer.get("Name", "")).split(" + ")
    return tuple(_PROFILE.sub("", name).strip() for name in names)


def _operators(nodes: Sequence[str], operators: Mapping[str, str]) -> str:
    named = [operators.get(node, node) for node in nodes[:LONGEST]]
    return " + ".join(named) + (f" + {len(nodes) - LONGEST} more" if len(nodes) > LONGEST else "")
