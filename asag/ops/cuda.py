"""The custom ops on a CUDA device: the kernels of `trt_plugins`, for inference.

They serve `torch.ops.asag.*` on CUDA tensors by themselves. The first call of each compiled kernel runs the definition
too: where the kernel cannot run or gives something else, a warning says so and the definition stays in use.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from asag.trt_plugins.operations import Operation
    from asag.trt_plugins.plan import Plan

_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 0.1}
"""How far a kernel may be from the definition, of the largest value; whole numbers and flags must be the same."""


class KernelOp:
    """One op: its kernel where that serves, else its definition; takes what the definition does.

    Feature maps may be float16 or bfloat16 beside float32 coordinates; results have the maps' type either way.
    """

    enabled = True
    """Whether kernels serve at all; of all ops together."""

    def __init__(self, operation: Operation, definition: Callable[..., Any]) -> None:
        self._operation, self._name, self._definition = operation, operation.name, definition
        self._serves: dict[Hashable, bool] = {}

    def __call__(self, *arguments: Any, **named: Any) -> tuple[Tensor, ...] | Tensor:
        """The op's outputs, one tensor where it has one."""
        if not KernelOp.enabled:
            found = self._definition(*arguments, **named)
            return found if isinstance(found, Tensor) else tuple(found)
        count = len(self._operation.inputs)
        names = (name for name, _ in self._operation.attributes)
        attributes = self._operation.complete(dict(zip(names, arguments[count:], strict=False)) | named)
        outputs = self._run(arguments[:count], attributes)
        return outputs[0] if len(outputs) == 1 else outputs

    def _run(self, tensors: Sequence[Tensor], attributes: Mapping[str, Any]) -> tuple[Tensor, ...]:
        from asag.trt_plugins.launch import DeviceArray, plan_of

        device, arrays = tensors[0].device, [DeviceArray.of_tensor(tensor) for tensor in tensors]
        try:
            plan = plan_of(self._name, arrays, attributes, _has_tensor_cores(device))
        except ValueError:  # sizes or a type without a kernel
            return self._defined(tensors, attributes)
        kernel = device, plan.defines
        if not self._serves.get(kernel, True):
            return self._defined(tensors, attributes)
        if kernel in self._serves:
            return self._launched(tensors, attributes, plan)
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{self._name} has not run yet in this size: run the model once before capturing it in a graph"
            )
        expected = self._defined(tensors, attributes)
        try:
            complaint = _complaint(self._launched(tensors, attributes, plan), expected, plan.element)
        except ValueError as error:  # no compiler, or CUDA refuses
            complaint = str(error)
        self._serves[kernel] = complaint is None
        if complaint is not None:
            warnings.warn(f"{self._name} runs as its PyTorch definition for {plan.element}: {complaint}", stacklevel=2)
        return expected

    def _defined(self, tensors: Sequence[Tensor], attributes: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The definition's results; for 16-bit maps worked out in float32, since not all its steps take mixed types."""
        given = list(zip(self._operation.inputs, tensors, strict=True))
        kind = next((tensor.dtype for what, tensor in given if what.type == "element"), torch.float32)
        wide = [
            tensor.float() if what.type == "element" and tensor.element_size() == 2 else tensor
            for what, tensor in given
        ]
        found = self._definition(*wide, *attributes.values())
        outputs = (found,) if isinstance(found, Tensor) else tuple(found)
        return tuple(
            output.to(kind) if what.type == "element" else output
            for what, output in zip(self._operation.outputs, outputs, strict=True)
        )

    def _launched(self, tensors: Sequence[Tensor], attributes: Mapping[str, Any], plan: Plan) -> tuple[Tensor, ...]:
        """The kernel's results, on the current stream. Raises ValueError where there is no compiler or CUDA refuses."""
        inputs = []
        for what, tensor in zip(self._operation.inputs, tensors, strict=True):
            value = tensor.to(getattr(torch, what.resolve(plan.element)))
            inputs.append(value if what.pyramid and plan.channels_last else value.contiguous())
        shapes = self._operation.output_shapes([tuple(tensor.shape) for tensor in tensors], attributes)
        outputs = tuple(
            torch.empty(tuple(shape), dtype=getattr(torch, what.resolve(plan.element)), device=inputs[0].device)
            for what, shape in zip(self._operation.outputs, shapes, strict=True)
        )
        _launch(self._name, inputs, outputs, attributes)
        return outputs


def register_cuda_kernels() -> None:
    """Let `torch.ops.asag.*` run as kernels on CUDA tensors; importing `asag.ops` does so."""
    from asag.trt_plugins.operations import DOMAIN, OPERATIONS

    for operation in OPERATIONS.values():
        kernel_op = KernelOp(operation, find_definition(operation))
        torch.library.register_kernel(f"{DOMAIN}::{operation.snake_name}", "cuda", kernel_op)


def find_definition(operation: Operation) -> Callable[..., Any]:
    """The plain-PyTorch definition of an op."""
    module = import_module(f"asag.ops.{operation.snake_name}")
    return getattr(module, f"{operation.snake_name}_definition")


@contextmanager
def definitions_only() -> Iterator[None]:
    """Leave the kernels aside while the block runs, for comparisons."""
    before, KernelOp.enabled = KernelOp.enabled, False
    try:
        yield
    finally:
        KernelOp.enabled = before


def _complaint(found: Sequence[Tensor], expected: Sequence[Tensor], element: str) -> str | None:
    """How a kernel's results differ from the definition's, or None."""
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            return f"its kernel gives {tuple(ours.shape)} in place of {tuple(theirs.shape)}"
        if not ours.dtype.is_floating_point:
            if not torch.equal(ours, theirs):
                return "its kernel gives other indices or flags"
        elif ours.numel():
            difference, largest = _largest_difference(ours.float(), theirs.float())
            if not difference <= _TOLERANCE[element] * largest:
                return f"its kernel is off by {difference:.2g} where the largest value is {largest:.2g}"
    return None


def _largest_difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Between values at the same place, and the largest finite value; what is no number in both is the same."""
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return float((ours - theirs).abs().masked_fill(same, 0).max()), float(theirs.nan_to_num(0, 0, 0).abs().max())


def _launch(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], attributes: Mapping[str, Any]) -> None:
    from asag.trt_plugins.launch import DeviceArray, launch

    device = inputs[0].device
    given, wanted = ([DeviceArray.of_tensor(tensor) for tensor in tensors] for tensors in (inputs, outputs))
    with torch.cuda.device(device):
        launch(name, given, wanted, attributes, torch.cuda.current_stream(device).cuda_stream)


def _has_tensor_cores(device: torch.device) -> bool:
    """Whether a launch on `device` finds the tensor cores that the kernels use."""
    from asag.trt_plugins.compile import FIRST_WITH_TENSOR_CORES

    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= FIRST_WITH_TENSOR_CORES
