"""Running a file on ONNX Runtime's CPU backend: as it stands, and as its user does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from asag.export.adoption.layouts import Port
from asag.export.adoption.plan import Plan
from asag.runtime.errors import one_line

Array = NDArray[Any]


class FileRun:
    """A file that is open in ONNX Runtime.

    observed: names of values within the graph to give in place of its outputs; measured: of values of which it gives
    the shape beside, by the name that `shape_of` has; optimized: whether the runtime may rewrite the graph. Raises
    ValueError where the runtime does not take the file.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        observed: Iterable[str] = (),
        measured: Iterable[str] = (),
        optimized: bool = True,
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False  # it would keep the memory of the largest run
        constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        outputs = [value.name for value in proto.graph.output]
        observed = list(dict.fromkeys(observed))
        self._constants = {name: numpy_helper.to_array(constants[name]) for name in observed if name in constants}
        given = [name for name in observed if name not in constants]
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        shapes = [helper.make_node("Shape", [name], [shape_of(name)]) for name in dict.fromkeys(measured)]
        self._names = [*(given or outputs), *(node.output[0] for node in shapes)]
        count, nodes = len(proto.graph.output), len(proto.graph.node)
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._names if name not in outputs)
        proto.graph.node.extend(shapes)
        try:
            self._session: Any = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime has a family of exception classes without a common public base
            raise ValueError(f"ONNX Runtime cannot open it: {one_line(error)}") from None
        finally:
            del proto.graph.output[count:]
            del proto.graph.node[nodes:]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """What is observed, else the outputs, and shapes, by name. Raises ValueError where the runtime fails."""
        try:
            found = self._session.run(self._names, dict(feeds))
        except Exception as error:  # as above
            raise ValueError(f"ONNX Runtime cannot run it: {one_line(error)}") from None
        return self._constants | dict(zip(self._names, found, strict=True))


def shape_of(name: str) -> str:
    """What the shape of a value is called in a run."""
    return f"{name}/asag_shape"


def foreign_feeds(images: Array, sizes: Array, plan: Plan) -> dict[str, Array]:
    """What the user of a foreign file feeds it, of images [B, 3, H, W] uint8 RGB and sizes [B, 2] of their content."""
    height, width = images.shape[2:]
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (plan.mean, plan.std))
    pixels = (images.astype(np.float32) / np.float32(255) - mean) / std
    if plan.bgr:
        pixels = pixels[:, ::-1]
    rows, columns = (np.arange(side) for side in (height, width))
    inside = (rows[:, None] < sizes[:, 0, None, None]) & (columns < sizes[:, 1, None, None])
    if plan.resize == "fit":
        pixels = pixels * inside[:, None]
    values = {"image": pixels, "mask": inside, "sizes": np.ones((len(images), 2))}
    return {
        port.name: np.ascontiguousarray(values[role], numpy_type(port)) for role, port in plan.interface.inputs.items()
    }


def numpy_type(port: Port) -> Any:
    """The NumPy type of an input or output."""
    return helper.tensor_dtype_to_np_dtype(port.type)


def foreign_detections(outputs: Mapping[str, Array], sizes: Array, plan: Plan) -> list[tuple[Array, Array, Array]]:
    """Boxes [N, 4] (`xyxy`, fractions of the content), scores [N] and category ids [N] of each image, best first.

    What the user of a foreign file makes of its outputs. Ranked detections of an index without a class get the id None
    would have, which is -1.
    """
    found = {role: np.asarray(outputs[port.name]) for role, port in plan.interface.outputs.items()}
    layout, columns = plan.interface.layout, plan.classes.columns
    ids = np.array([-1 if number is None else number for number in columns])
    results = []
    for image, (height, width) in enumerate(sizes.astype(np.float64)):
        rows = {role: values[image].astype(np.float64) for role, values in found.items()}
        boxes = rows["boxes"] if "boxes" in rows else rows["rows"][:, :4]
        if layout.boxes == "cxcywh":
            boxes = np.concatenate((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), 1)
        if layout.frame == "input":
            boxes = boxes * ([plan.size[1], plan.size[0]] * 2)
        content = np.array([width, height, width, height])
        if layout.frame == "input" and plan.interface.has_mask:
            content = np.array([plan.size[1], plan.size[0]] * 2)
        query, scores, column = _ranked(rows) if layout.ranked else _best(rows, plan, len(columns))
        known = (column >= 0) & (column < len(ids))
        labels = np.where(known, ids[np.clip(column, 0, len(ids) - 1)], -1)
        results.append(((boxes / content)[query], scores, labels))
    return results


def _ranked(rows: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """The row, score and class index of each detection."""
    scores = rows["scores"] if "scores" in rows else rows["rows"][:, 4]
    column = rows["labels"] if "labels" in rows else rows["rows"][:, 5]
    return np.arange(len(scores)), scores, column.astype(np.int64)


def _best(rows: Mapping[str, Array], plan: Plan, columns: int) -> tuple[Array, Array, Array]:
    """The query, score and column of each detection, of the columns that are classes."""
    from asag.export.adoption.adapters import BEST

    if plan.softmax:
        powers = np.exp(rows["logits"] - rows["logits"].max(1, keepdims=True))
        scores = (powers / powers.sum(1, keepdims=True))[:, :columns]
    elif plan.interface.layout.logits:
        scores = 1 / (1 + np.exp(-rows["logits"]))
    else:
        scores = rows["rows"][:, 4:]
    used = np.array(plan.classes.used)
    scores = scores[:, used]
    count = min(len(scores), BEST)
    if plan.softmax:
        query = np.argsort(-scores.max(1), kind="stable")[:count]
        place = scores.argmax(1)[query]
    else:
        query, place = np.divmod(np.argsort(-scores.ravel(), kind="stable")[:count], len(used))
    return query, scores[query, place], used[place]


def with_dims(outputs: Sequence[Port], found: Mapping[str, Array]) -> tuple[Port, ...]:
    """Outputs with the sides that a run gave them, but for their batch."""
    return tuple(
        replace(port, dims=(port.dims[0] if port.dims else None, *found[port.name].shape[1:])) for port in outputs
    )
