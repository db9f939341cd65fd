"""How the time of an exported model on ONNX Runtime divides into the stages of the network.

The runtime's profiler times single nodes, of the graph as the runtime optimized it: fused, inlined and reordered. So
the optimized graph is written out, each of its nodes is renamed to its stage, and the profile of that graph, run as it
stands, needs no guessing.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag.runtime.errors import BackendUnavailableError, one_line
from asag.runtime.metadata import ModelMetadata
from asag.runtime.onnx_file import read_onnx
from asag.runtime.postprocessing import OUTPUT_NAMES
from asag.runtime.session import INPUT_NAMES
from asag.runtime.stages.graph import network_parts, node_parts, part_ends

OTHER = "other"
"""Nodes that the runtime made and that nothing ties to a stage."""

_MARK = re.compile(r"\|(.+?)\|")
_CALIBRATION_NODES = 500
_CALIBRATION_RUNS = 15


class OnnxStageProfile:
    """An exported file on ONNX Runtime's CPU provider, under its profiler.

    Raises BackendUnavailableError where onnx or ONNX Runtime is missing, and ValueError for a file that is no export of
    this project.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        try:
            import onnx
            import onnx.inliner
            import onnxruntime
        except ImportError as error:
            raise BackendUnavailableError(
                f"time per stage needs onnx and ONNX Runtime: pip install {error.name}"
            ) from None
        self._onnxruntime = onnxruntime
        self._threads = threads
        self._folder = tempfile.TemporaryDirectory(prefix="asag-profile-")
        self._overhead = self._measure_overhead(onnx)
        model, metadata = read_onnx(path)
        self._parts = network_parts(metadata)
        try:
            self._session = self._open(self._optimized(onnx, model, metadata), "stages")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except Exception as error:  # the runtime has a family of exception classes without a common public base
            raise ValueError(f"ONNX Runtime cannot profile {path}: {one_line(error)}") from None

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one batch; see :meth:`runtime.session.Session.run`."""
        feeds = {name: np.ascontiguousarray(tensors[name]) for name in INPUT_NAMES}
        return dict(zip(OUTPUT_NAMES, self._session.run(list(OUTPUT_NAMES), feeds), strict=True))

    def finish(self) -> list[dict[str, float]]:
        """The share of each stage in every run so far, adding up to 1; the profile ends with this call.

        A node's time reaches from the end of the node before it to its own end. What recording itself takes, measured
        on a chain of trivial nodes, is taken off for each recorded node.
        """
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        self._folder.cleanup()
        nodes = [event for event in events if event["cat"] == "Node"]
        shares = []
        for run in (event for event in events if event["name"] == "model_run"):
            seconds = dict.fromkeys((*self._parts, OTHER), 0.0)
            last, recorded = run["ts"], 0
            for event in _during(nodes, run):
                recorded += 1
                mark = _MARK.match(event["name"])
                if mark is not None:  # a node of a loop's body has none, and its time is the loop's
                    end = event["ts"] + event["dur"]
                    seconds[mark[1]] += max((end - last) / 1e6 - recorded * self._overhead, 0.0)
                    last, recorded = end, 0
            total = sum(seconds.values())
            shares.append({stage: value / total for stage, value in seconds.items()})
        return shares

    def _optimized(self, onnx: Any, model: Any, metadata: ModelMetadata) -> Any:
        """The model as the runtime executes it, each node named after its stage."""
        ends = part_ends(model.graph.node, metadata)
        inlined = onnx.inliner.inline_local_functions(model)
        _mark(inlined.graph, node_parts(inlined.graph.node, ends))
        target = Path(self._folder.name) / "optimized.onnx"
        options = self._options()
        options.optimized_model_filepath = str(target)
        self._onnxruntime.InferenceSession(inlined.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(target)
        for number, node in enumerate(optimized.graph.node):
            node.name = f"|{_marked_stage(node)}|{number}"
        return optimized

    def _open(self, model: Any, name: str | None = None) -> Any:
        """A session of the graph as it stands, with a profile where it has a name."""
        options = self._options()
        options.graph_optimization_level = self._onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if name is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._folder.name) / name)
        return self._onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _options(self) -> Any:
        options = self._onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        return options

    def _measure_overhead(self, onnx: Any) -> float:
        """Seconds that recording one node takes: the same chain of small additions with and without a profile."""
        names = [f"v{number}" for number in range(_CALIBRATION_NODES + 1)]
        nodes = [
            onnx.helper.make_node("Add", [value, "one"], [after], name=f"add {after}")
            for value, after in pairwise(names)
        ]
        ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in (names[0], names[-1])]
        one = onnx.numpy_helper.from_array(np.ones(1, np.float32), "one")
        graph = onnx.helper.make_graph(nodes, "chain", ends[:1], ends[1:], [one])
        opset = onnx.helper.make_opsetid("", 17)
        model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
        recorded, plain = self._open(model, "overhead"), self._open(model)
        differences = []
        for _ in range(_CALIBRATION_RUNS):
            marks = [time.perf_counter()]
            for session in (recorded, plain):
                session.run(None, {names[0]: np.zeros(1, np.float32)})
                marks.append(time.perf_counter())
            differences.append(marks[1] - marks[0] - (marks[2] - marks[1]))
        recorded.end_profiling()
        return max(statistics.median(differences) / _CALIBRATION_NODES, 0.0)


def _mark(graph: Any, stages: Sequence[str]) -> None:
    """Put its stage into the name of every node and of every value that a node makes.

    Whatever the runtime makes of them, it names after them.
    """
    fixed = {value.name for value in graph.output}
    names: dict[str, str] = {}
    for number, (node, stage) in enumerate(zip(graph.node, stages, strict=True)):
        node.name = f"|{stage}|{number}"
        names |= {name: f"{name}|{stage}|" for name in node.output if name and name not in fixed}
    del graph.value_info[:]
    for node in graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
        _rename_read(node, names)


def _rename_read(node: Any, names: Mapping[str, str]) -> None:
    """Rename what a node reads, in the graphs inside it too: values of an inlined graph have unique names."""
    node.input[:] = [names.get(name, name) for name in node.input]
    for attribute in node.attribute:
        if attribute.HasField("g"):
            for inner in attribute.g.node:
                _rename_read(inner, names)
            for value in attribute.g.output:
                value.name = names.get(value.name, value.name)


def _marked_stage(node: Any) -> str:
    """The stage of a node of the optimized graph: by its name, or what it makes, or what it reads."""
    marks = (_MARK.search(name) for name in (node.name, *node.output, *node.input))
    return next((mark[1] for mark in marks if mark is not None), OTHER)


def _during(events: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The events that lie within another one, by the time they end."""
    inside = [event for event in events if run["ts"] <= event["ts"] < run["ts"] + run["dur"]]
    yield from sorted(inside, key=lambda event: event["ts"] + event["dur"])
