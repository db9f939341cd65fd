"""How the exporter writes the custom ops, each as one node of domain `asag` with its body attached afterwards, and the
group norm, as standard operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript.values import Op

import asag.ops  # noqa: F401 (registers `torch.ops.asag`)
from asag.export.op_bodies.domain import DOMAIN_VERSION, asag_opset, op
from asag.trt_plugins.operations import DOMAIN, OPERATIONS, Operation, Tensor

_TENSOR_TYPES = (
    "tensor(float)",
    "tensor(float16)",
    "tensor(bfloat16)",
    "tensor(bool)",
    "tensor(int32)",
    "tensor(int64)",
)
_ATTRIBUTE_TYPES = {int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT, tuple: OpSchema.AttrType.INTS}


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """PyTorch's ops -> functions that emit ONNX nodes, for the exporter's `custom_translation_table`."""
    custom = {
        getattr(torch.ops.asag, operation.snake_name).default: _translation(operation)
        for operation in OPERATIONS.values()
    }
    return {torch.ops.aten.group_norm.default: _group_norm, **custom}


def _group_norm(maps: Any, groups: int, weight: Any, bias: Any, epsilon: float = 1e-5, *_: Any) -> Any:
    """Means of rows, then means of those: one sum over a group of a large map loses three digits in float32.

    The exporter's own way is an InstanceNormalization, which ONNX Runtime computes with one sum.
    """
    channels, height, width = (int(side) for side in maps.shape[1:])
    apart = op.Reshape(maps, _numbers(0, groups, channels // groups, height, width))
    of_channel = _numbers(groups, channels // groups, 1, 1)
    centred = apart - _mean_of_groups(apart)
    deviation = op.Sqrt(_mean_of_groups(centred * centred) + epsilon)
    normed = centred * (op.Reshape(weight, of_channel) / deviation) + op.Reshape(bias, of_channel)
    return op.Reshape(normed, _numbers(0, channels, height, width))


def _mean_of_groups(apart: Any) -> Any:
    """[B, G, C, H, W] -> [B, G, 1, 1, 1]"""
    return op.ReduceMean(op.ReduceMean(apart, _numbers(4)), _numbers(2, 3))


def _numbers(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _translation(operation: Operation) -> Callable[..., Any]:
    node = Op(asag_opset, operation.name, op_schema(operation))
    names = [name for name, _ in operation.attributes]
    inputs = len(operation.inputs)

    def emit(*arguments: Any) -> Any:
        return node(*arguments[:inputs], **dict(zip(names, arguments[inputs:], strict=True)))

    return emit


def op_schema(operation: Operation) -> OpSchema:
    """The op's ONNX schema; each tensor may have its own type."""

    def parameter(tensor: Tensor) -> OpSchema.FormalParameter:
        return OpSchema.FormalParameter(tensor.name, f"T_{tensor.name}")

    tensors = (*operation.inputs, *operation.outputs)
    return OpSchema(
        operation.name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[parameter(tensor) for tensor in operation.inputs],
        outputs=[parameter(tensor) for tensor in operation.outputs],
        type_constraints=[(f"T_{tensor.name}", _TENSOR_TYPES, f"type of {tensor.name}") for tensor in tensors],
        attributes=[OpSchema.Attribute(name, _ATTRIBUTE_TYPES[kind]) for name, kind in operation.attributes],
    )
