"""The group norm of a large map keeps float32's digits, in PyTorch and in an exported file."""

from __future__ import annotations

import copy

import onnxruntime
import pytest
import torch
from torch import Tensor

from asag.export.operators import translation_table
from asag.parts.layers import MapNorm


@pytest.fixture
def norm() -> MapNorm:
    torch.manual_seed(0)
    norm = MapNorm(2, 8)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm.eval()


@pytest.fixture
def maps(norm: MapNorm) -> Tensor:
    """Far from zero, as sums lose the most, and with channels side by side as convolutions leave them."""
    return (torch.rand(2, 8, 300, 400) ** 3 + 1).to(memory_format=torch.channels_last)


def error(found: Tensor, norm: MapNorm, maps: Tensor) -> float:
    exact = copy.deepcopy(norm).double()(maps.double())
    return float((found - exact).abs().max() / exact.abs().max())


@torch.no_grad()
def test_in_pytorch(norm: MapNorm, maps: Tensor) -> None:
    assert error(norm(maps), norm, maps) < 2e-6


@torch.no_grad()
def test_in_an_exported_file(norm: MapNorm, maps: Tensor) -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        norm,
        (maps,),
        dynamo=True,
        opset_version=20,
        custom_translation_table=translation_table(),
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: maps.contiguous().numpy()})[0]
    assert error(torch.from_numpy(found), norm, maps) < 2e-6
