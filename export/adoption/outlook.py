"""What can be said of a foreign file without running it: which layout it has, what is in the way, how to adopt it."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

import onnx

from asag.export.adoption.attention import CUTTING_OPERATORS, find_candidates
from asag.export.adoption.foreign_file import ForeignFile, read_foreign
from asag.export.adoption.graph import GraphIndex, all_graphs, attribute_of
from asag.export.adoption.layouts import Interface, Port, UnsupportedError, ports, recognise
from asag.export.adoption.plan import LIKELY_SETS

LACKING = ("NonMaxSuppression", "NonZero", "RoiAlign")
"""Operators that TensorRT-RTX 1.7 does not have, beside scatters with a reduction."""

_BEFORE_RANKING = ("Sigmoid", "Softmax", "Add", "Cast", *CUTTING_OPERATORS)


def outlook(path: Path) -> tuple[dict[str, str], str | None]:
    """What `asag adopt` would find in a foreign file, in words, and the command, where one of the layouts may fit.

    Raises as :func:`read_foreign`.
    """
    foreign = read_foreign(path)
    graph = foreign.proto.graph
    index = GraphIndex(graph)
    candidates = find_candidates(index)
    within = sum(len(candidate.levels) for candidate in candidates)
    nodes = [node for inner in all_graphs(graph) for node in inner.node]
    samples = sum(node.op_type == "GridSample" for node in nodes)
    found = {
        "deformable attentions": f"{len(candidates)} by their form, with {within} of {samples} GridSample",
        "operators that TensorRT-RTX lacks": ", ".join(_lacking(nodes)) or "none",
    }
    if foreign.half is not None:
        found["types"] = "16 bits in part; the adopted file computes in float32"
    try:
        interface = recognise(foreign.inputs, _outputs(foreign))
    except UnsupportedError as error:
        return {"layout": str(error), **found}, None
    except ValueError as error:
        named = ["--layout", "NAME"] if "--layout" in str(error) else []
        return {"layout": str(error), **found}, " ".join([*_words(path), *named])
    layout = interface.layout
    return {"layout": f"{layout.name} ({layout.title})", **found}, _command(foreign, interface, index)


def _outputs(foreign: ForeignFile) -> tuple[Port, ...]:
    """With the sides that exporters leave open although the graph tells them."""
    return ports(onnx.shape_inference.infer_shapes(foreign.proto, data_prop=True).graph.output)


def _words(path: Path) -> list[str]:
    return ["asag", "adopt", shlex.quote(str(path)), "-o", shlex.quote(f"{path.stem}-adopted.onnx")]


def _command(foreign: ForeignFile, interface: Interface, index: GraphIndex) -> str:
    words = _words(foreign.path)
    if None in interface.image.dims[2:]:
        words += ["--input-size", "HxW"]
    columns = interface.columns or head_size(index)
    likely = LIKELY_SETS.get(columns or 0)
    named = foreign.said.classes is not None and columns in (None, len(foreign.said.classes))
    if not named and (likely or interface.layout.ranked):
        words += ["--classes", likely or "FILE"]
    return " ".join(words)


def _lacking(nodes: list[onnx.NodeProto]) -> list[str]:
    names = [node.op_type for node in nodes if node.op_type in LACKING]
    scatters = [node for node in nodes if node.op_type in ("ScatterND", "ScatterElements")]
    names += [
        f"{node.op_type} with a reduction" for node in scatters if attribute_of(node, "reduction", "none") != "none"
    ]
    return [f"{count} {name}" for name, count in sorted(Counter(names).items())]


def head_size(index: GraphIndex) -> int | None:
    """How many classes the head tells apart whose best pairs a file ranks; None where that cannot be seen.

    What is ranked last is followed back to the matrix that made it.
    """
    ranking = [node for node in index.graph.node if node.op_type == "TopK"]
    pending = [ranking[-1].input[0]] if ranking else []
    widths: list[int] = []
    while pending:
        node = index.node(pending.pop())
        if node is None:
            continue
        if node.op_type in ("MatMul", "Gemm"):
            matrix = index.constants.get(node.input[1])
            turned = node.op_type == "Gemm" and attribute_of(node, "transB", 0)
            if matrix is not None and len(matrix.dims) == 2:
                widths.append(matrix.dims[0] if turned else matrix.dims[1])
        elif node.op_type in _BEFORE_RANKING:
            pending += node.input if node.op_type in ("Add", "Concat") else node.input[:1]
    return max(widths, default=None)
