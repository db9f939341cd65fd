"""What stands before and after a foreign graph, so that the whole obeys our contract.

Before it, pixels are normalized and sizes become masks; after it, outputs become the best detections, with boxes as
fractions of the content. The foreign graph itself stays as it is, but for its names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from asag.export.adoption.graph import NodeWriter, prune, rename_values, replace
from asag.export.adoption.plan import Plan

PREFIX = "foreign/"
"""Of every name of the foreign graph."""

HELD_SIZES = "adapter/sizes"

BEST = 300
"""Detections of an image at most, where the file does not rank them itself."""


@dataclass(frozen=True)
class Extent:
    """What one run of a file told: rows of its outputs, queries or ranked detections."""

    rows: int

    def detections(self, ranked: bool) -> int:
        """Detections of an image after the adapters."""
        return self.rows if ranked else min(self.rows, BEST)


def put_in_contract(proto: onnx.ModelProto, plan: Plan, extent: Extent) -> None:
    """Put the adapters around the graph of `proto`, in place.

    Inputs become images [B, 3, H, W] uint8 and sizes [B, 2], outputs boxes, scores, labels and overflow, as
    `asag.deploy.DeployedDetector` has them.
    """
    graph = proto.graph
    rename_values(graph, lambda name: PREFIX + name)
    before, after = NodeWriter("adapter/before/"), NodeWriter("adapter/after/")
    _Before(plan, before).write()
    _After(plan, extent, after).write()
    interface = plan.interface
    batch = "batch" if interface.batch is None else interface.batch
    found = extent.detections(interface.layout.ranked)
    fed = {PREFIX + port.name for port in interface.inputs.values()}
    weights = [value for value in graph.input if value.name not in fed]
    replace(
        graph.input,
        [
            helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 3, *plan.size]),
            helper.make_tensor_value_info("sizes", TensorProto.FLOAT, [batch, 2]),
            *weights,
        ],
    )
    replace(
        graph.output,
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [batch, found, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, found]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, [batch, found]),
            helper.make_tensor_value_info("overflow", TensorProto.INT32, [batch]),
        ],
    )
    replace(graph.node, [*before.nodes, *graph.node, *after.nodes])
    graph.initializer.extend((*before.weights, *after.weights))
    prune(graph)


class _Before:
    """images, sizes -> the foreign inputs."""

    def __init__(self, plan: Plan, write: NodeWriter) -> None:
        self.plan, self.add, self.inputs = plan, write, plan.interface.inputs

    def write(self) -> None:
        self._hold_sizes()
        inside = self._inside() if self.plan.resize == "fit" or "mask" in self.inputs else None
        self._image(inside)
        if "mask" in self.inputs:
            assert inside is not None
            rows = self.add("Squeeze", inside, self.add.integers(1))
            port = self.inputs["mask"]
            self.add("Cast", rows, to=port.type, output=PREFIX + port.name)
        if "sizes" in self.inputs:  # so that boxes come out as fractions
            port = self.inputs["sizes"]
            one = helper.make_tensor("one", port.type, [1], [1])
            self.add("ConstantOfShape", self.add("Shape", "sizes"), value=one, output=PREFIX + port.name)

    def _hold_sizes(self) -> None:
        """Sizes between one pixel and the input's own, whatever a caller sends, as `asag.deploy.within_input` does."""
        add, one = self.add, self.add.constant(1, np.float32)
        least = add("Where", add("GreaterOrEqual", "sizes", one), "sizes", one)
        add("Min", least, add.constant([self.plan.size], np.float32), output=HELD_SIZES)

    def _image(self, inside: str | None) -> None:
        add, plan = self.add, self.plan
        pixels = add("Div", add("Cast", "images", to=TensorProto.FLOAT), add.constant(255, np.float32))
        for operator, values, neutral in (("Sub", plan.mean, 0), ("Div", plan.std, 1)):
            if any(value != neutral for value in values):
                pixels = add(operator, pixels, add.constant(np.reshape(values, (1, 3, 1, 1)), np.float32))
        if plan.bgr:
            pixels = add("Gather", pixels, add.integers(2, 1, 0), axis=1)
        if inside is not None and plan.resize == "fit":
            pixels = add("Where", inside, pixels, add.constant(0, np.float32))
        port = self.inputs["image"]
        add("Cast", pixels, to=port.type, output=PREFIX + port.name)

    def _inside(self) -> str:
        """[B, 1, H, W] bool: where the content is."""
        add = self.add
        along = []
        for axis, side in enumerate(self.plan.size):
            extent = add("Gather", HELD_SIZES, add.integers(axis), axis=1)
            places = np.arange(side, dtype=np.float32).reshape((1, 1, side, 1) if axis == 0 else (1, 1, 1, side))
            shaped = add("Reshape", extent, add.integers(-1, 1, 1, 1))
            along.append(add("Less", add.constant(places, np.float32), shaped))
        return add("And", *along)


class _After:
    """The foreign outputs -> boxes, scores, labels, overflow."""

    def __init__(self, plan: Plan, extent: Extent, write: NodeWriter) -> None:
        self.plan, self.extent, self.add = plan, extent, write
        self.layout = plan.interface.layout
        self.outputs = plan.interface.outputs

    def write(self) -> None:
        boxes, scores, labels = self._ranked() if self.layout.ranked else self._best()
        self.add("Identity", self._in_content(self._corners(boxes)), output="boxes")
        self.add("Identity", scores, output="scores")
        self.add("Identity", labels, output="labels")
        images = self.add("Shape", "sizes", end=1)
        zero = helper.make_tensor("zero", TensorProto.INT32, [1], [0])
        self.add("ConstantOfShape", images, value=zero, output="overflow")

    def _float(self, role: str) -> str:
        port = self.outputs[role]
        name = PREFIX + port.name
        return name if port.type == TensorProto.FLOAT else self.add("Cast", name, to=TensorProto.FLOAT)

    def _part(self, rows: str, first: int, end: int) -> str:
        """Columns of the last axis."""
        add = self.add
        return add("Slice", rows, add.integers(first), add.integers(end), add.integers(-1))

    def _ranked(self) -> tuple[str, str, str]:
        """Boxes [B, K, 4], scores [B, K] and labels [B, K] of detections that the file ranks itself."""
        add = self.add
        if "rows" in self.outputs:
            rows = self._float("rows")
            boxes = self._part(rows, 0, 4)
            scores = add("Squeeze", self._part(rows, 4, 5), add.integers(-1))
        else:
            boxes, scores = self._float("boxes"), self._float("scores")
        if "labels" in self.outputs:
            index = PREFIX + self.outputs["labels"].name
        else:
            index = add("Squeeze", self._part(rows, 5, 6), add.integers(-1))
        index = add("Cast", index, to=TensorProto.INT64)
        columns = self.plan.classes.columns
        held = add("Min", add("Max", index, add.constant(0, np.int64)), add.constant(len(columns) - 1, np.int64))
        known = add("Equal", held, index)
        if None in columns:
            is_class = add.constant([number is not None for number in columns], np.bool_)
            known = add("And", known, add("Gather", is_class, held))
        ids = add.constant([-1 if number is None else number for number in columns], np.int64)
        return boxes, add("Where", known, scores, add.constant(0, np.float32)), add("Gather", ids, held)

    def _best(self) -> tuple[str, str, str]:
        """The best pairs of query and class; with softmax the best queries, each with its best class."""
        add = self.add
        rows, count = self.extent.rows, self.extent.detections(ranked=False)
        boxes, scores = self._queries()
        classes = len(self.plan.classes.used)
        ids = add.constant(self.plan.classes.ids, np.int64)
        if self.plan.softmax:
            one = add.integers(1)
            best, place = add.outputs("TopK", [scores, one], 2, axis=2)
            scores, query = add.outputs("TopK", [add("Squeeze", best, add.integers(2)), add.integers(count)], 2, axis=1)
            column = add("GatherElements", add("Squeeze", place, add.integers(2)), query, axis=1)
        else:
            flat = add("Reshape", scores, add.integers(-1, rows * classes))
            scores, pair = add.outputs("TopK", [flat, add.integers(count)], 2, axis=1)
            width = add.constant(classes, np.int64)
            query = add("Div", pair, width)
            column = add("Sub", pair, add("Mul", query, width))
        places = add("Tile", add("Unsqueeze", query, add.integers(2)), add.integers(1, 1, 4))
        return add("GatherElements", boxes, places, axis=1), scores, add("Gather", ids, column)

    def _queries(self) -> tuple[str, str]:
        """Boxes [B, Q, 4] and the scores [B, Q, C] of the columns that are classes."""
        add, columns = self.add, self.plan.classes.columns
        if self.layout.logits:
            boxes = self._float("boxes")
            scores = self._float("logits")
            scores = add("Softmax", scores, axis=-1) if self.plan.softmax else add("Sigmoid", scores)
            if self.plan.softmax:
                scores = self._part(scores, 0, len(columns))
        else:
            rows = self._float("rows")
            boxes, scores = self._part(rows, 0, 4), self._part(rows, 4, 4 + len(columns))
        if None in columns:
            scores = add("Gather", scores, add.integers(*self.plan.classes.used), axis=2)
        return boxes, scores

    def _corners(self, boxes: str) -> str:
        if self.layout.boxes == "xyxy":
            return boxes
        add = self.add
        centre, half = self._part(boxes, 0, 2), add("Div", self._part(boxes, 2, 4), add.constant(2, np.float32))
        return add("Concat", add("Sub", centre, half), add("Add", centre, half), axis=-1)

    def _in_content(self, boxes: str) -> str:
        """Fractions of the content."""
        add, plan = self.add, self.plan
        if self.layout.frame == "input" and (plan.resize == "stretch" or plan.interface.has_mask):
            return boxes
        scale = add("Gather", HELD_SIZES, add.integers(1, 0, 1, 0), axis=1)  # width, height, width, height
        if self.layout.frame == "input":
            sides = add.constant(plan.size[::-1] * 2, np.float32)
            boxes = add("Mul", boxes, sides)
        return add("Div", boxes, add("Unsqueeze", scale, add.integers(1)))
