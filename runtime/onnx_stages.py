"""Looking into an exported model: the values that its stages hand on, as further outputs of a copy of the file.

The values are found by the ops of domain ``asag`` and the parameters' names in the checkpoint; names that the exporter
gave to nodes and values say nothing:

- ``p2`` .. ``p5`` [B, C, H, W]: the first four inputs of ``PyramidRoIAlign``;
- ``fixed_anchors`` [B, A, 5]: what the first ``AdaptiveProbing`` chooses patches by, or ``GatherAnchors`` reads where
  nothing is probed (cx, cy, w, h in pixels of the input, confidence);
- for each probed level ``p4_map`` [B, 8, H, W], ``p4_corners`` [B, K, 2] (cells), ``p4_valid`` [B, K]: of its
  ``AdaptiveProbing``; ``p4_anchors`` [B, A, 5]: what the next one reads (of the last level, the end of what
  ``GatherAnchors`` reads);
- ``anchors`` [B, Q, 4] (``cxcywh`` in pixels) and ``valid`` [B, Q]: the outputs of ``GatherAnchors``;
- ``queries`` [B, Q, C] and ``proposal_xyzr`` or ``proposal_pixels`` [B, Q, 4]: what follows from the first
  ``PyramidRoIAlign`` without the head's parameters and is read by what needs them;
- ``head_scores`` [B, Q, classes] and ``head_boxes`` [B, Q, 4] (``xyxy``, fractions): what the best detections are
  chosen from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendUnavailableError, one_line
from runtime.graph_stages import DOMAIN, first_op
from runtime.metadata import ModelMetadata
from runtime.postprocessing import OUTPUT_NAMES
from runtime.session import INPUT_NAMES

HEAD_PARAMETERS = "detector.heads."

_PROBED = ("p4", "p3")


class OnnxStages:
    """The stages of an exported file, run by ONNX Runtime on the CPU.

    Raises BackendUnavailableError where onnx or ONNX Runtime is missing, and ValueError for a file that is no export
    of this project. Exposing a value may keep the runtime from fusing across it.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise BackendUnavailableError(
                f"looking into stages needs onnx and ONNX Runtime: pip install {error.name}"
            ) from None
        path = Path(path)
        model = onnx.load(path)
        self.metadata = ModelMetadata.from_properties({entry.key: entry.value for entry in model.metadata_props})
        self._graph = _Graph(model.graph)
        self._values = self._graph.locate()
        shown = {value.name for value in model.graph.output}
        for name in dict.fromkeys(name for names in self._values.values() for name in names):
            if name not in shown:
                model.graph.output.add().name = name
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session: Any = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime has a family of exception classes without a common public base
            raise ValueError(f"ONNX Runtime cannot show the stages of {path}: {one_line(error)}") from None

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """The values above, as far as the file shows them, and the model's outputs; floats as float32."""
        names = list(dict.fromkeys([*OUTPUT_NAMES, *(name for names in self._values.values() for name in names)]))
        feeds = {name: np.ascontiguousarray(tensors[name]) for name in INPUT_NAMES}
        raw = dict(zip(names, self._session.run(names, feeds), strict=True))
        found = {key: _readable(raw[names[0]]) for key, names in self._values.items() if len(names) == 1}
        found |= {name: _readable(raw[name]) for name in OUTPUT_NAMES}
        self._add_last_level(found)
        batch, queries = found["anchors"].shape[:2]
        wanted = {"queries": found["p2"].shape[1], "proposal_xyzr": 4, "proposal_pixels": 4}
        for key, width in wanted.items():
            fitting = [raw[name] for name in self._values.get(key, ()) if raw[name].shape == (batch, queries, width)]
            found.pop(key, None)
            if fitting:
                found[key] = _readable(fitting[0])
        if "head_scores" in found:
            found["head_scores"] = found["head_scores"].reshape(batch, queries, -1)
        return found

    def _add_last_level(self, found: dict[str, NDArray]) -> None:
        """The last level's anchors end what ``GatherAnchors`` reads, after those of all levels before."""
        levels = [level for level in _PROBED if f"{level}_map" in found]
        everything = found.pop("all_anchors")
        if not levels:
            found["fixed_anchors"] = everything
            return
        before = [found["fixed_anchors"], *(found[f"{level}_anchors"] for level in levels[:-1])]
        found[f"{levels[-1]}_anchors"] = everything[:, sum(anchors.shape[1] for anchors in before) :]


def _readable(value: NDArray) -> NDArray:
    return value.astype(np.float32) if value.dtype == np.float16 else value


class _Graph:
    """A graph and where its values come from; nodes are in the order of computation, as ONNX demands."""

    def __init__(self, graph: Any) -> None:
        self.nodes = list(graph.node)
        self.constants = {tensor.name for tensor in graph.initializer}
        self.producer = {output: node for node in self.nodes for output in node.output}

    def locate(self) -> dict[str, list[str]]:
        """Names of the graph's values by the names above; several are candidates told apart by their shape."""
        gather = first_op(self.nodes, "GatherAnchors")
        pyramid = first_op(self.nodes, "PyramidRoIAlign")
        found = {f"p{level}": [name] for level, name in zip((2, 3, 4, 5), pyramid.input[:4], strict=True)}
        found |= {"all_anchors": [gather.input[0]], "anchors": [gather.output[0]], "valid": [gather.output[1]]}
        probings = [node for node in self.nodes if (node.domain, node.op_type) == (DOMAIN, "AdaptiveProbing")]
        before = "fixed"
        for level, node in zip(_PROBED, probings, strict=False):
            found |= {
                f"{before}_anchors": [node.input[0]],
                f"{level}_map": [node.input[2]],
                f"{level}_corners": [node.output[1]],
                f"{level}_valid": [node.output[2]],
            }
            before = level
        found |= self._proposals(pyramid)
        for key, output, op_type in (("head_scores", "scores", "TopK"), ("head_boxes", "boxes", "GatherElements")):
            node = self._behind(output, op_type)
            if node is not None:
                found[key] = [node.input[0]]
        return found

    def _behind(self, value: str, op_type: str) -> Any:
        """The nearest node of a type that a value comes from, or None."""
        pending = [value]
        seen = set()
        while pending:
            node = self.producer.get(pending.pop(0))
            if node is None or id(node) in seen:
                continue
            if node.op_type == op_type:
                return node
            seen.add(id(node))
            pending.extend(node.input)
        return None

    def _proposals(self, pyramid: Any) -> dict[str, list[str]]:
        of_head = {name for name in self.constants if name.startswith(HEAD_PARAMETERS)}
        after_proposals, after_head = set(pyramid.output), set(of_head)
        for node in self.nodes:
            if any(name in after_proposals for name in node.input):
                after_proposals.update(node.output)
            if any(name in after_head for name in node.input):
                after_head.update(node.output)
        between = after_proposals - after_head
        border = list(self._border(between, after_head))
        sliced = []
        for name in border:
            node = self.producer[name]
            if node.op_type == "Slice" and node.input[0] in between:
                sliced.append(node.input[0])
        second = [
            node.input[4]
            for node in self.nodes
            if (node.domain, node.op_type) == (DOMAIN, "PyramidRoIAlign") and node.name != pyramid.name
        ]
        # A head that reads the pyramid by boxes again slices its proposals as fractions; the boxes say the same.
        boxes = {"proposal_pixels": second} if second else {"proposal_xyzr": sliced}
        found = {"queries": border, **boxes}
        return {key: list(dict.fromkeys(names)) for key, names in found.items() if names}

    def _border(self, between: set[str], after_head: set[str]) -> Iterator[str]:
        """Values computed without the head's parameters that something with them reads, in the order of the graph."""
        read = {
            name for node in self.nodes if any(output in after_head for output in node.output) for name in node.input
        }
        for node in self.nodes:
            yield from (output for output in node.output if output in between and output in read)
