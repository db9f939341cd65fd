"""Which nodes of an adopted file bear 16 bits: an allow-list, since nothing is known of the detector but its operators.

Convolutions and what passes their numbers on, large matrix products that lead to a norm or another product, and the
samples of deformable attention. Everything else stays float32:

- norms, also where they are written out: squares pass 65504;
- the products of queries and keys, and Softmax: they overflow in large backbones;
- inverse sigmoids, whose 1e-5 is below float16's normal range; anchors, which are infinite where there is none;
- references, locations and sine positions: no bits would be left for a pixel's fraction;
- distributions over distances, what TopK reads, and the heads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx

from asag.trt_plugins.operations import DOMAIN

LARGEST_BEARABLE = 8000.0
"""Magnitude on measured images above which a value stays float32: float16 ends at 65504, and other images differ."""

LEAST_SIDE = 64
"""Of a constant matrix: smaller products are not worth two casts."""

_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Split", "Concat")
_ACTIVATIONS = (
    "Relu",
    "LeakyRelu",
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Clip",
    "Gelu",
    "Elu",
    "PRelu",
    "Tanh",
    "Mish",
)
_POOLING = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
PASSING = (*_LAYOUT, *_ACTIVATIONS, *_POOLING, "Add", "Mul", "Resize")
"""After a convolution they stay in 16 bits while all that they read is."""

_DATA_INPUTS = {
    **dict.fromkeys((*_LAYOUT, *_POOLING, "Resize"), 1),
    "Concat": None,
}
"""How many of the first inputs are numbers, and not shapes, axes or scales; all where there is no entry."""

_NORMS = (
    "LayerNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "BatchNormalization",
    "RMSNormalization",
    "ReduceMean",
    "LpNormalization",
)
_MATRICES = ("MatMul", "Gemm", "Conv")
_HARMED = ("Softmax", "Sigmoid", "TopK", "Log", "Exp", "Where", "LogSoftmax", "ArgMax", "Pow", "Sin", "Cos")
"""Readers for which a product's rounding decides something."""


def data_inputs(node: onnx.NodeProto) -> range:
    """Positions of the inputs of a node that take 16 bits where it computes in them."""
    count = _DATA_INPUTS.get(node.op_type) if node.domain != DOMAIN else None
    return range(len(node.input) if count is None else count)


def bearing_nodes(graph: onnx.GraphProto, kept: Collection[str] = ()) -> set[int]:
    """Positions in `graph.node` of the nodes that compute in 16 bits, but for our ops, which say it themselves.

    kept: values that stay float32, with the nodes that read or make them.
    """
    fixed = _fixed_values(graph)
    half: set[str] = set()
    chosen = set()
    products = _bearing_products(graph)
    for index, node in enumerate(graph.node):
        data = [node.input[place] for place in data_inputs(node)]
        if any(name in kept for name in (*node.input, *node.output)):
            continue
        passing = node.op_type in PASSING and any(name in half for name in data)
        if (passing and all(name in half or name in fixed or not name for name in data)) or node.op_type == "Conv":
            chosen.add(index)
        elif index in products:
            chosen.add(index)
            continue  # what is added to a product is in float32
        half.update(node.output if index in chosen else ())
    return chosen


def too_large(graph: onnx.GraphProto, magnitudes: Mapping[str, float]) -> tuple[str, ...]:
    """Values of the bearing nodes whose largest magnitude 16 bits may not hold on other images."""
    values = (name for node in measured_nodes(graph) for name in (*node.input, *node.output))
    return tuple(name for name in dict.fromkeys(values) if magnitudes.get(name, 0.0) > LARGEST_BEARABLE)


def measured_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The bearing nodes, and our ops: their values are to be measured."""
    bearing = bearing_nodes(graph)
    return [node for index, node in enumerate(graph.node) if index in bearing or node.domain == DOMAIN]


def _fixed_values(graph: onnx.GraphProto) -> set[str]:
    """Weights, constants, and what is computed of these alone."""
    fixed = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if all(name in fixed or not name for name in node.input) and not node.op_type.startswith("Random"):
            fixed.update(node.output)
    return fixed


def _bearing_products(graph: onnx.GraphProto) -> set[int]:
    """Products with a large constant matrix that lead to nothing which rounding harms, before a norm or a product."""
    large = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) >= LEAST_SIDE}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    return {
        index
        for index, node in enumerate(graph.node)
        if node.op_type in ("MatMul", "Gemm")
        and len(node.input) > 1
        and node.input[1] in large
        and not _harms(node.output[0], readers, outputs)
    }


def _harms(value: str, readers: Mapping[str, Sequence[onnx.NodeProto]], outputs: Collection[str]) -> bool:
    """Whether rounding a product decides something before the next norm or product."""
    pending, seen = [value], {value}
    while pending:
        name = pending.pop()
        if name in outputs:
            return True
        for node in readers.get(name, ()):
            if node.op_type in _HARMED or _reads_places(node, name):
                return True
            if node.op_type not in (*_NORMS, *_MATRICES, "Shape") and node.domain != DOMAIN:
                new = set(node.output) - seen
                seen |= new
                pending += _named(new)
    return False


def _named(values: Iterable[str]) -> list[str]:
    return [name for name in values if name]


def _reads_places(node: onnx.NodeProto, value: str) -> bool:
    """Whether one of our ops, or a GridSample, takes a value as places or shares, and not as what is sampled."""
    return (node.domain == DOMAIN or node.op_type == "GridSample") and value in node.input[1:]
