"""The family as ONNX files: standard operators, stages, precision, and the same detections in either frame."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from asag.deploy import DeployedDetector
from asag.export.model import build_onnx
from asag.export.precision import convert_precision
from asag.families.sap_detr import SAP_DETR
from asag.families.sap_detr.config import FRAMES
from asag.runtime import open_session
from asag.runtime.metadata import ModelMetadata
from asag.runtime.onnx_file import write_metadata
from asag.runtime.stages.draw import stage_panels
from tests.builders import random_picture, uint8_batch
from tests.families.sap_detr.small_detector import random_detector, small_config, small_info

SIZE = (96, 128)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each frame `FRAME.pt`, `FRAME-fp32.onnx` and `FRAME-fp16.onnx`."""
    folder = tmp_path_factory.mktemp("exported")
    size = dataclasses.replace(small_config().size, encoder_layers=1, decoder_layers=2)
    for frame in FRAMES:
        model = DeployedDetector(random_detector(small_config(frame=frame, size=size)), small_info(SIZE))
        proto, described = build_onnx(model.eval()), model.describe()
        for precision in ("fp32", "fp16"):
            converted = convert_precision(proto, precision, ModelMetadata(**described))
            write_metadata(converted, ModelMetadata(**{**described, "precision": precision}))
            onnx.checker.check_model(converted)
            onnx.save(converted, folder / f"{frame}-{precision}.onnx")
        torch.save(model, folder / f"{frame}.pt")
    return folder


def test_operators_are_standard_and_stages_are_in_the_file(exported: Path) -> None:
    proto = onnx.load(exported / "padded-fp32.onnx")
    operators = {node.op_type for node in proto.graph.node}
    assert not {node.op_type for node in proto.graph.node if node.domain}
    assert "GridSample" not in operators
    made = {name for node in proto.graph.node for name in node.output}
    model = torch.load(exported / "padded.pt", weights_only=False)
    for stage in SAP_DETR.stages(model.detector.config):
        assert set(stage.value_names()) <= made


def test_attention_is_what_engines_fuse(exported: Path) -> None:
    """Product, sum, softmax, product; one in the encoder, two in each layer of the decoder."""
    graph = onnx.load(exported / "padded-fp32.onnx").graph
    producer = {name: node for node in graph.node for name in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    found = [node for node in graph.node if node.op_type == "Softmax"]
    assert len(found) == 1 + 2 * 2
    for softmax in found:
        before = producer[softmax.input[0]]
        scores = producer[before.input[0]] if before.op_type == "Add" else before
        assert (scores.op_type, readers[softmax.output[0]].op_type) == ("MatMul", "MatMul")


def test_no_value_of_a_gaussian_is_larger_than_its_bias(exported: Path) -> None:
    """Nothing for every cell and coordinate; queries times cells times heads is the most."""
    proto = onnx.shape_inference.infer_shapes(onnx.load(exported / "padded-fp32.onnx"), data_prop=True)
    config = torch.load(exported / "padded.pt", weights_only=False).detector.config
    cells = SIZE[0] // 16 * SIZE[1] // 16
    made = {value.name: value.type.tensor_type for value in proto.graph.value_info}
    after = False
    for name in (name for node in proto.graph.node for name in node.output):
        after |= name == "start/queries"
        sides = [max(dim.dim_value, 1) for dim in made[name].shape.dim] if after and name in made else []
        assert np.prod(sides, dtype=int) <= config.queries * cells * config.size.attention_heads


def test_gaussians_sines_and_logits_stay_float(exported: Path) -> None:
    graph = onnx.load(exported / "padded-fp16.onnx").graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}
    kept = [node for node in graph.node if node.op_type in ("Sin", "Cos", "Log", "Tanh", "Softmax", "Sigmoid")]
    assert len(kept) > 10
    assert {types[name] for node in kept for name in node.output if name in types} == {onnx.TensorProto.FLOAT}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Conv")]
    half = [node for node in products if types.get(node.output[0]) == onnx.TensorProto.FLOAT16]
    assert len(half) > len(products) / 2
    names = {tensor.name for tensor in graph.initializer}
    assert "detector.point_map.convolutions.2.weight_half" in names


@pytest.mark.parametrize("frame", FRAMES)
def test_onnx_runtime_gives_what_pytorch_gives(exported: Path, frame: str) -> None:
    images, sizes = uint8_batch([random_picture(seed, 96 - 30 * seed, 40 + 40 * seed) for seed in range(3)], *SIZE)
    model = torch.load(exported / f"{frame}.pt", weights_only=False)
    with torch.no_grad():
        boxes, scores, labels, overflow = (value.numpy() for value in model(images, sizes))
    tensors = {"images": images.numpy(), "sizes": sizes.numpy()}
    found = open_session(exported / f"{frame}-fp32.onnx").run(tensors)
    assert not overflow.any()
    np.testing.assert_allclose(found["scores"], scores, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found["labels"], labels)
    np.testing.assert_allclose(found["boxes"], boxes, rtol=1e-4, atol=1e-5)
    half = open_session(exported / f"{frame}-fp16.onnx").run(tensors)
    np.testing.assert_allclose(half["scores"], scores, rtol=0, atol=1e-2)


def test_every_stage_is_drawn(exported: Path) -> None:
    """The grid, what became of it, and where the best detection looks."""
    picture = random_picture(1, *SIZE)
    with open_session(exported / "padded-fp32.onnx") as session:
        panels = stage_panels(Image.fromarray(picture), session.stages(picture), 0.01)
    assert [panel.caption for panel in panels[:-1]] == [
        "start: 20; where the best 4 look, in a colour each",
        "decoder 0: where the best detection looks, 4 heads",
        "decoder 0: 20; where the best 4 look, in a colour each",
        "decoder 1: where the best detection looks, 4 heads",
    ]
