"""Deformable attention over selected tokens, from PyTorch to an ONNX file in float32 and in half precision."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from asag.export.op_bodies import bodies_of
from asag.export.op_bodies.domain import DOMAIN_VERSION, OPSET_VERSION
from asag.export.operators import translation_table
from asag.export.precision import convert_precision
from asag.ops import multi_scale_deformable_attention, select_tokens
from asag.trt_plugins.operations import DOMAIN
from tests.runtime.toy_detector import toy_metadata

SHAPES, POINTS = ((3, 4), (1, 2)), (2, 1)
CAPACITY = 5


class SparseLayer(nn.Module):
    """The best tokens look at all of them; what they see replaces them."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(8, 8)
        self.score, self.offsets, self.weights = nn.Linear(8, 1), nn.Linear(8, 12), nn.Linear(8, 6)
        self.output = nn.Linear(8, 8)

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        indices, active = select_tokens(self.score(tokens).squeeze(-1), counts, CAPACITY)
        rows = indices.unsqueeze(-1).expand(-1, -1, 8)
        queries = tokens.gather(1, rows)
        locations = self.offsets(queries).unflatten(2, (2, 3, 2)).sigmoid()
        weights = self.weights(queries).unflatten(2, (2, 3)).softmax(-1)
        value = self.value(tokens).unflatten(2, (2, 4))
        seen = self.output(multi_scale_deformable_attention(value, locations, weights, SHAPES, POINTS))
        return tokens.scatter(1, rows, torch.where(active.unsqueeze(-1), seen, queries))


@functools.cache
def layer() -> SparseLayer:
    torch.manual_seed(0)
    return SparseLayer().eval()


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 14, 8, generator=torch.Generator().manual_seed(1)), torch.arange(batch) + 2


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.onnx.export(
            layer(),
            inputs(2),
            dynamo=True,
            opset_version=OPSET_VERSION,
            dynamic_shapes=({0: batch}, {0: batch}),
            custom_translation_table=translation_table(),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    proto.functions.extend(bodies_of(proto.graph.node))
    proto.opset_import.add(domain=DOMAIN, version=DOMAIN_VERSION)
    return proto


def run(proto: onnx.ModelProto, batch: int) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (tensor.numpy() for tensor in inputs(batch)), strict=True)))[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_file_gives_what_pytorch_gives(exported: onnx.ModelProto, batch: int) -> None:
    onnx.checker.check_model(exported, full_check=True)
    nodes = {node.op_type: node for node in exported.graph.node if node.domain == DOMAIN}
    assert sorted(function.name for function in exported.functions) == sorted(nodes)
    given = {each.name: helper.get_attribute_value(each) for each in nodes["MultiScaleDeformableAttention"].attribute}
    assert given == {"level_shapes": [3, 4, 1, 2], "level_points": [2, 1]}
    with torch.no_grad():
        expected = layer()(*inputs(batch)).numpy()
    np.testing.assert_allclose(run(exported, batch), expected, atol=1e-6)


def test_locations_and_scores_stay_float32(exported: onnx.ModelProto) -> None:
    """The value and the weights are half, and so is the result, up to the next linear layer."""
    metadata = dataclasses.replace(toy_metadata(), half_layers=("value.bias", "output.bias"))
    half = convert_precision(exported, "fp16", metadata)
    onnx.checker.check_model(half, full_check=True)
    values = (*half.graph.input, *half.graph.value_info, *half.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    nodes = {node.op_type: node for node in half.graph.node if node.domain == DOMAIN}
    attention, selection = nodes["MultiScaleDeformableAttention"], nodes["SelectTokens"]
    assert [types[name] for name in attention.input] == [TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.FLOAT16]
    assert types[attention.output[0]] == TensorProto.FLOAT16
    (reader,) = (node for node in half.graph.node if attention.output[0] in node.input)
    assert reader.op_type == "MatMul"
    assert types[selection.input[0]] == TensorProto.FLOAT
    np.testing.assert_allclose(run(half, 2), run(exported, 2), atol=4e-3)
