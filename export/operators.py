"""How the exporter writes the custom ops: each as one node of domain `asag`, its body attached afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript.values import Op

import asag.ops  # noqa: F401 (registers `torch.ops.asag`)
from export.op_bodies.domain import DOMAIN_VERSION, asag_opset
from trt_plugins.operations import DOMAIN, OPERATIONS, Operation, Tensor

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
    """`torch.ops.asag.*` -> functions that emit one ONNX node, for the exporter's `custom_translation_table`."""
    return {
        getattr(torch.ops.asag, operation.snake_name).default: _translation(operation)
        for operation in OPERATIONS.values()
    }


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
