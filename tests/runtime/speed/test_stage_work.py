"""Arithmetic and bytes of a graph, against numbers known from elsewhere."""

from __future__ import annotations

import io
import math
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.utils.flop_counter import FlopCounterMode

from asag.deploy import DeployedDetector
from asag.parts.backbones.resnet import ResNet
from asag.runtime.onnx_file import read_onnx
from asag.runtime.speed.stage_work import GraphValues, node_operations, stage_work
from tests.exports import small_export


def operations(model: onnx.ModelProto) -> float:
    values = GraphValues(model, 1)
    return sum(node_operations(node, values) for node in model.graph.node)


@pytest.mark.slow
def test_resnet_50_has_its_known_multiply_adds() -> None:
    """4.1 thousand million at 224x224, of which two million are the classifier, which a detector has not."""
    for height, width in ((224, 224), (800, 1216)):
        target = io.BytesIO()
        backbone = ResNet("resnet50").eval()
        torch.onnx.export(backbone, (torch.zeros(1, 3, height, width),), target, dynamo=False)
        model = onnx.load_from_string(target.getvalue())
        expected = (4.089e9 - 2048 * 1000) * height * width / 224**2
        assert operations(model) / 2 == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("decoder", ["adamixer", "sparse_rcnn", "deformable"])
def test_the_detector_has_what_pytorch_counts(decoder: str) -> None:
    exported = small_export(decoder)
    deployed = exported.deployed
    height, width = deployed.input_size
    inputs = torch.zeros((2, 3, height, width), dtype=torch.uint8), torch.tensor([[height, width]] * 2)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        deployed(inputs[0], inputs[1].float())
    # Whether the two matrix products of an attention are counted depends on PyTorch's version, so they never are here.
    parts = {
        name.partition(".")[2]: sum(count for operation, count in counts.items() if "attention" not in str(operation))
        for name, counts in counter.get_flop_counts().items()
    }
    found = {work.stage: work for work in stage_work(exported.proto, exported.metadata, batch_size=2)}
    assert found["features"].operations == parts["detector.backbone"] + parts["detector.neck"]
    # PyTorch counts the class branch of the proposals besides, which only training needs, and no custom op.
    deployed_proposals = parts["detector.proposals"] - class_branch_operations(deployed, batch=2)
    assert found["anchors"].operations == pytest.approx(parts["detector.anchor_generator"], rel=0.01)
    sizes = deployed.detector.config.size
    queries = 2 * deployed.detector.config.budget.most
    attention = 2 * 2 * queries * deployed.detector.config.budget.most * sizes.channels
    rois = 2 * queries * sizes.channels * 7 * 7 * 16
    assert found["proposals"].operations == pytest.approx(deployed_proposals + rois + attention)
    mixing = rois
    if decoder == "adamixer":
        points, mixed, channels = sizes.sampling_points, sizes.mixed_points, sizes.channels // sizes.sampling_groups
        per_group = points * channels * 16 + points * channels * channels + mixed * points * channels
        mixing = 2 * queries * sizes.sampling_groups * per_group
    elif decoder == "deformable":
        levels, taps = 4, 4
        mixing = 2 * queries * sizes.channels * levels * sizes.attended_points * taps
    assert found["head"].operations == pytest.approx(parts["detector.heads.main"] + mixing + attention)


def class_branch_operations(deployed: DeployedDetector, batch: int) -> int:
    branches = deployed.detector.proposals.branches
    layers = [layer for layer in (*branches.class_branch, branches.class_logits) if isinstance(layer, torch.nn.Linear)]
    return sum(2 * layer.weight.numel() for layer in layers) * batch * deployed.detector.config.budget.most


def test_sampling_and_mixing_by_their_formulas() -> None:
    shapes = {"p2": (1, 8, 16, 16), "p3": (1, 8, 8, 8), "p4": (1, 8, 4, 4), "p5": (1, 8, 2, 2)}
    shapes |= {"points": (1, 5, 2, 3, 3), "parameters": (1, 5, 2 * (16 + 21)), "out": (1, 5, 56)}
    node = helper.make_node("SamplingMixing", list(shapes)[:6], ["out"], domain="asag", mixed_points=7)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("asag", 1)]
    model = helper.make_model(helper.make_graph([node], "one", values[:6], values[6:]), opset_imports=opsets)
    sampling = 5 * 2 * 3 * 4 * (4 * 4)  # queries, groups, points, channels of a group; levels and neighbours
    mixing = 5 * 2 * (3 * 4 * 4 + 7 * 3 * 4)  # points times the channel matrix, then the point matrix times that
    assert operations(model) == 2 * (sampling + mixing)


def test_ordinary_operators() -> None:
    shapes = {"x": ("batch", 6, 8, 8), "w": (4, 3, 3, 3), "v": (4, 5, 2, 2), "a": (7, 3), "b": (7, 9)}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], group=2, pads=[1, 1, 1, 1]),
        helper.make_node("ConvTranspose", ["y", "v"], ["z"], strides=[2, 2]),
        helper.make_node("Gemm", ["a", "b"], ["c"], transA=1),
        helper.make_node("Relu", ["z"], ["r"]),
    ]
    outputs = [helper.make_tensor_value_info("c", TensorProto.FLOAT, (3, 9))]  # the rest comes of inference
    model = helper.make_model(helper.make_graph(nodes, "few", list(values.values()), outputs))
    counts = [node_operations(node, GraphValues(model, 3)) for node in nodes]
    convolution = 3 * 4 * 64 * 3 * 9
    transposed = 3 * 4 * 64 * 5 * 4
    assert counts == [2 * convolution, 2 * transposed, 2 * 3 * 9 * 7, 0]


@pytest.mark.parametrize(("precision", "weight_bytes"), [("fp32", 4), ("fp16", 2)])
def test_bytes_of_the_backbone(precision: str, weight_bytes: int, tmp_path: Path) -> None:
    """It reads its weights and the pixels and writes P2..P5."""
    deployed = small_export().deployed
    model, metadata = read_onnx(small_export().write(tmp_path / "model.onnx", precision))
    work = stage_work(model, metadata)
    assert [item.stage for item in work] == ["features", "anchors", "proposals", "head", "detections"]
    assert (work[0].operations == 0) == (precision == "fp16")
    assert (work[0].half_operations == 0) == (precision == "fp32")
    height, width = deployed.input_size
    parts = (deployed.detector.backbone, deployed.detector.neck)
    weights = sum(parameter.numel() for part in parts for parameter in part.parameters())
    cells = sum(math.ceil(height / stride) * math.ceil(width / stride) for stride in (4, 8, 16, 32))
    (pyramid,) = (node for node in model.graph.node if node.op_type == "PyramidRoIAlign")
    map_bytes = cells * deployed.detector.config.size.channels * GraphValues(model, 1).item_size(pyramid.input[0])
    assert work[0].bytes == pytest.approx(3 * height * width + weight_bytes * weights + map_bytes, rel=0.01)


def test_a_graph_without_shapes_says_so() -> None:
    node = helper.make_node("Unknown", ["x"], ["y"], domain="elsewhere")
    product = helper.make_node("MatMul", ["y", "y"], ["z"])
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)]
    model = helper.make_model(helper.make_graph([node, product], "g", [value], []), opset_imports=opsets)
    with pytest.raises(ValueError, match="does not tell the shape of"):
        node_operations(product, GraphValues(model, 1))
