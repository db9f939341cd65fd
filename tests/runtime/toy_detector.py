"""A toy detector that honours the model contract: as an ONNX file with a function of domain `asag`, and in numpy.

It divides the input into 4 x 4 cells; each cell is a box whose score is its mean brightness, cell i of class i mod 3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from asag.runtime.coco_dataset import CocoFolder, open_coco
from asag.runtime.metadata import ModelMetadata
from asag.runtime.session import Session

HEIGHT, WIDTH, CELLS = 64, 96, 4
CATEGORY_IDS, CATEGORY_NAMES = (1, 3, 7), ("circle", "square", "ring")
OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("asag", 1)]


def toy_metadata(**changes: object) -> ModelMetadata:
    values: dict[str, object] = {
        "family": "toys",
        "preset": "toy",
        "choices": {"head": "main", "capacity": (8, 16)},
        "stages": (),
        "half_layers": (),
        "precision": "fp32",
        "input_height": HEIGHT,
        "input_width": WIDTH,
        "input_type": "uint8",
        "shorter_side": 64,
        "longer_side": 96,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "category_ids": CATEGORY_IDS,
        "category_names": CATEGORY_NAMES,
        "nms_iou": None,
        "max_detections": 16,
        "package_version": "0.1.0",
        "weights_digest": "0" * 64,
    }
    return ModelMetadata(**(values | changes))  # type: ignore[arg-type]


def cell_boxes() -> NDArray[np.float32]:
    """The 16 cells [16, 4] as xyxy fractions of the padded input."""
    edges = np.linspace(0, 1, CELLS + 1)
    return np.array(
        [(edges[x], edges[y], edges[x + 1], edges[y + 1]) for y in range(CELLS) for x in range(CELLS)], np.float32
    )


def cell_labels() -> NDArray[np.int64]:
    return np.array([CATEGORY_IDS[index % 3] for index in range(CELLS * CELLS)], np.int64)


def build_toy_model(metadata: ModelMetadata | None, batch: int | str = "batch") -> onnx.ModelProto:
    constants = {
        "cells": cell_boxes(),
        "all_labels": cell_labels()[None],
        "zeros": np.zeros((1, 16), np.int64),
        "input_extent": np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32),
        "swapped": np.array([1, 0, 1, 0], np.int64),
        "middle": np.array([1], np.int64),
        "flat": np.array([0, 16], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("CellScores", ["pixels"], ["grid"], domain="asag"),
        helper.make_node("Reshape", ["grid", "flat"], ["scores"]),
        helper.make_node("Gather", ["sizes", "swapped"], ["extent"], axis=1),
        helper.make_node("Div", ["input_extent", "extent"], ["factor"]),
        helper.make_node("Unsqueeze", ["factor", "middle"], ["wide_factor"]),
        helper.make_node("Mul", ["wide_factor", "cells"], ["boxes"]),
        helper.make_node("Cast", ["scores"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Mul", ["whole", "zeros"], ["nothing"]),
        helper.make_node("Add", ["nothing", "all_labels"], ["labels"]),
        helper.make_node("ReduceSum", ["nothing", "middle"], ["nothing_per_image"], keepdims=0),
        helper.make_node("Cast", ["nothing_per_image"], ["overflow"], to=TensorProto.INT32),
    ]
    scores = helper.make_function(
        "asag",
        "CellScores",
        ["pixels"],
        ["scores"],
        [
            helper.make_node("AveragePool", ["pixels"], ["pooled"], kernel_shape=[16, 24], strides=[16, 24]),
            helper.make_node("Constant", [], ["channel"], value_ints=[1]),
            helper.make_node("ReduceMean", ["pooled", "channel"], ["brightness"], keepdims=0),
            helper.make_node("Constant", [], ["white"], value_float=255.0),
            helper.make_node("Div", ["brightness", "white"], ["scores"]),
        ],
        [helper.make_opsetid("", 18)],
    )
    graph = helper.make_graph(
        nodes,
        "toy",
        [
            helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 3, HEIGHT, WIDTH]),
            helper.make_tensor_value_info("sizes", TensorProto.FLOAT, [batch, 2]),
        ],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [batch, 16, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 16]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, [batch, 16]),
            helper.make_tensor_value_info("overflow", TensorProto.INT32, [batch]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=OPSETS, functions=[scores], ir_version=10)
    if metadata is not None:
        helper.set_model_props(model, metadata.to_properties())
    onnx.checker.check_model(model, full_check=True)
    return model


class ToySession(Session):
    """The toy detector in numpy; ``change`` may alter its outputs, ``calls`` records the batch sizes."""

    def __init__(
        self,
        metadata: ModelMetadata | None = None,
        change: Callable[[dict[str, NDArray]], None] = lambda outputs: None,
        name: str = "toy",
        max_batch: int | None = None,
    ) -> None:
        super().__init__(
            name, "numpy", "fp32", metadata or toy_metadata(), versions={"numpy": np.__version__}, max_batch=max_batch
        )
        self._change = change
        self.calls: list[int] = []

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        images, sizes = tensors["images"], tensors["sizes"]
        batch = len(images)
        self.calls.append(batch)
        cells = images.astype(np.float32).reshape(batch, 3, CELLS, HEIGHT // CELLS, CELLS, WIDTH // CELLS)
        factor = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32) / sizes[:, [1, 0, 1, 0]]
        outputs = {
            "boxes": factor[:, None, :] * cell_boxes(),
            "scores": cells.mean(axis=(1, 3, 5)).reshape(batch, 16) / 255,
            "labels": np.repeat(cell_labels()[None], batch, axis=0),
            "overflow": np.zeros(batch, np.int32),
        }
        self._change(outputs)
        return outputs


def write_toy_dataset(root: Path, images: int = 4, seed: int = 0) -> CocoFolder:
    """Dark noise with bright cells, which are the annotated objects."""
    generator = np.random.default_rng(seed)
    folder = root / "val2017"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir()
    records, annotations = [], []
    for number in range(1, images + 1):
        pixels = generator.integers(1, 30, (HEIGHT, WIDTH, 3), np.uint8)
        for cell in generator.choice(16, 3, replace=False):
            y, x = divmod(int(cell), CELLS)
            pixels[y * 16 : y * 16 + 16, x * 24 : x * 24 + 24] = generator.integers(180, 255, (16, 24, 3))
            box = [x * 24, y * 16, 24, 16]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(cell_labels()[cell]),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(folder / f"{number}.png")
        records.append({"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH})
    categories = [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, CATEGORY_NAMES, strict=True)]
    content = {"images": records, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return open_coco(root)
