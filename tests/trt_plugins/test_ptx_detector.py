"""A whole detector whose custom ops run as their kernels' PTX, called as on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import asag.ops.cuda
from asag.deploy import DeployedDetector
from asag.ops.cuda import KernelOp, find_definition
from asag.trt_plugins.launch import DeviceArray
from asag.trt_plugins.operations import OPERATIONS
from tests.builders import random_detector, random_picture, small_info, uint8_batch
from tests.ptx_machine.launch import launch_ptx


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_detector_with_kernels_detects_the_same(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    def launch(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], attributes: Mapping[str, Any]) -> None:
        launched.append(name)
        arrays = [[DeviceArray.of_tensor(tensor) for tensor in tensors] for tensors in (inputs, outputs)]
        launch_ptx(name, *arrays, attributes)

    monkeypatch.setattr(asag.ops.cuda, "_launch", launch)
    monkeypatch.setattr(asag.ops.cuda, "_has_tensor_cores", lambda device: True)
    deployed = DeployedDetector(random_detector(), small_info((160, 192))).eval()
    if channels_last:
        deployed = deployed.to(memory_format=torch.channels_last)
    images, sizes = uint8_batch([random_picture(0, 150, 180)], 160, 192)
    with torch.inference_mode():
        expected = deployed(images, sizes)
        for operation in OPERATIONS.values():
            monkeypatch.setattr(torch.ops.asag, operation.snake_name, KernelOp(operation, find_definition(operation)))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*runs as its PyTorch definition")
            deployed(images, sizes)  # tries the kernels
            tried = len(launched)
            found = deployed(images, sizes)
    assert set(launched[:tried]) == {"AdaptiveProbing", "GatherAnchors", "PyramidRoIAlign", "SamplingMixing"}
    assert launched[tried:] == launched[:tried]
    assert torch.equal(found[3], expected[3])
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=0)
