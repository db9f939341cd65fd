"""A CUDA graph can hold the deployed model: no trip to the host, no shape that depends on the data.

Runs on PyTorch's fake tensors, which claim to be on a GPU and hold no values, so that no GPU is needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asag.deploy import DeployedDetector
from tests.builders import random_detector, small_config, small_info


class DeviceWatch(TorchDispatchMode):
    """Notes every operation, and those that touch a tensor outside the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.elsewhere: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type != "cuda" for tensor in tensors):
            self.elsewhere.append(str(func))
        return result


def watch(model: nn.Module, *inputs: tuple[tuple[int, ...], torch.dtype]) -> tuple[tuple[Tensor, ...], DeviceWatch]:
    """Run the model's shapes through a GPU that is not there."""
    with FakeTensorMode():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                        tensors[name] = nn.Parameter(twin, False) if isinstance(tensor, nn.Parameter) else twin
        values = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in inputs]
        with DeviceWatch() as seen, torch.inference_mode():
            return model(*values), seen


@pytest.mark.parametrize("decoder", ["adamixer", "sparse_rcnn", "deformable"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_deployed_model_stays_on_the_gpu(decoder: str, batch: int) -> None:
    deployed = DeployedDetector(random_detector(small_config(decoder=decoder)), small_info())
    images = ((batch, 3, *deployed.input_size), torch.uint8)
    outputs, seen = watch(deployed, images, ((batch, 2), torch.float32))
    assert [output.shape[0] for output in outputs] == [batch] * 4
    assert seen.operations > 100
    assert seen.elsewhere == []


def test_what_a_graph_cannot_hold_is_noticed() -> None:
    class Constant(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value + torch.tensor([1.0, 2.0]).to(value.device)

    class HostTrip(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value[: int(value.sum())]

    _, seen = watch(Constant(), ((3, 2), torch.float32))
    assert seen.elsewhere
    with pytest.raises(DataDependentOutputException):
        watch(HostTrip(), ((3, 2), torch.float32))
