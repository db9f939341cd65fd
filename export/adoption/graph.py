"""Looking around in an ONNX graph, and adding nodes to it."""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper


class GraphIndex:
    """Who makes and who reads each value of a graph. The graph must not change while it is in use."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.producer: dict[str, int] = {}
        self.readers: dict[str, list[int]] = {}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        for index, node in enumerate(graph.node):
            for name in node.output:
                self.producer[name] = index
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
            for name in dict.fromkeys((*node.input, *read_inside(node))):
                if name:
                    self.readers.setdefault(name, []).append(index)

    def node(self, value: str) -> onnx.NodeProto | None:
        """The node that makes a value; None for weights and inputs."""
        index = self.producer.get(value)
        return None if index is None else self.graph.node[index]

    def only_reader(self, value: str) -> int | None:
        """The one node that reads the numbers of a value, beside those that ask for its shape; None for another count,
        or where the value is an output of the graph.
        """
        found = [index for index in self.readers.get(value, ()) if self.graph.node[index].op_type != "Shape"]
        return found[0] if len(found) == 1 and value not in self.outputs else None

    def constant(self, value: str) -> NDArray[Any] | None:
        """The numbers of a weight or constant."""
        tensor = self.constants.get(value)
        return None if tensor is None else numpy_helper.to_array(tensor)


def attribute_of(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute of a node, text as `str`."""
    for attribute in node.attribute:
        if attribute.name == name:
            value = helper.get_attribute_value(attribute)
            return value.decode() if isinstance(value, bytes) else value
    return default


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node, such as the branches of an If."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes, at any depth."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_graphs(inner)


def read_inside(node: onnx.NodeProto) -> Iterator[str]:
    """Values that the graphs inside a node read, or give, of those around them."""
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from inner.input
            yield from read_inside(inner)
        yield from (value.name for value in graph.output)


def rename_values(graph: onnx.GraphProto, new_name: Callable[[str], str]) -> None:
    """Call every value, weight and node of a graph and of those inside it as `new_name` says, in place."""
    for inner in all_graphs(graph):
        for value in (*inner.input, *inner.output, *inner.value_info, *inner.initializer):
            value.name = new_name(value.name)
        for sparse in inner.sparse_initializer:
            sparse.values.name = new_name(sparse.values.name)
        for node in inner.node:
            node.name = new_name(node.name) if node.name else ""
            node.input[:] = [new_name(name) if name else "" for name in node.input]
            node.output[:] = [new_name(name) if name else "" for name in node.output]


def prune(graph: onnx.GraphProto) -> None:
    """Remove nodes and weights that no output needs, in place."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output if name):
            kept.append(node)
            needed.update(node.input)
            needed.update(read_inside(node))
    kept.reverse()
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    known = [value for value in graph.value_info if value.name in needed]
    for field, items in (("node", kept), ("initializer", weights), ("value_info", known)):
        replace(getattr(graph, field), items)


def mend(graph: onnx.GraphProto) -> None:
    """Put nodes after those that they read of, and drop names of nodes that another has, and nodes that are there
    twice, in place.

    Converters are careless here, and runtimes do not all mind. Raises ValueError for nodes in a circle.
    """
    first: dict[tuple[str, ...], onnx.NodeProto] = {}
    pairs = [(node, first.setdefault(tuple(node.output), node)) for node in graph.node]
    replace(graph.node, [node for node, other in pairs if node is other or not _same(node, other)])
    producer = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    before = {
        place: {producer[name] for name in (*node.input, *read_inside(node)) if name in producer}
        for place, node in enumerate(graph.node)
    }
    if any(other >= place for place, others in before.items() for other in others):
        try:
            order = list(graphlib.TopologicalSorter(before).static_order())
        except graphlib.CycleError as error:
            names = " and ".join(graph.node[place].op_type for place in error.args[1][:2])
            raise ValueError(f"nodes read each other's values, {names} among them") from None
        replace(graph.node, [graph.node[place] for place in order])
    seen = set()
    for node in graph.node:
        node.name = "" if node.name in seen else node.name
        seen.add(node.name)


def _same(one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    """Whether two nodes of the same outputs are one."""
    fields = ("op_type", "domain", "input", "attribute")
    return all(getattr(one, field) == getattr(other, field) for field in fields)


def replace(field: Any, items: Iterable[Any]) -> None:
    """Give a repeated field of a protobuf message other items."""
    items = list(items)
    del field[:]
    field.extend(items)


class NodeWriter:
    """Writes nodes and their constants, with names of their own."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def __call__(self, operator: str, *inputs: str, output: str = "", domain: str = "", **attributes: Any) -> str:
        """Add a node and give the name of its first output."""
        return self.outputs(operator, inputs, 1, output=output, domain=domain, **attributes)[0]

    def outputs(
        self, operator: str, inputs: Sequence[str], count: int, output: str = "", domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node of several outputs and give their names."""
        name = f"{self.prefix}{len(self.nodes)}_{operator}"
        names = [output or name] if count == 1 else [f"{name}_{number}" for number in range(count)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, name, domain=domain, **attributes))
        return names

    def constant(self, values: Any, kind: Any) -> str:
        """Add a weight and give its name."""
        name = f"{self.prefix}constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, kind), name))
        return name

    def integers(self, *values: int) -> str:
        """A constant list of whole numbers: axes, or a shape."""
        return self.constant(values, np.int64)
