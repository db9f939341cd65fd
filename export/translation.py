"""How the exporter writes the custom ops: each as one node of domain `asag`, its body attached afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript import OnnxFunction
from onnxscript.values import Op

import asag.ops  # noqa: F401 (registers `torch.ops.asag`)
from export.functions import OP_FUNCTIONS
from export.functions.domain import DOMAIN, DOMAIN_VERSION, asag_opset

_TENSOR_TYPES = (
    "tensor(float)",
    "tensor(float16)",
    "tensor(bfloat16)",
    "tensor(bool)",
    "tensor(int32)",
    "tensor(int64)",
)
_ATTRIBUTE_TYPES = {int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT}
_TORCH_NAMES = {
    "AdaptiveProbing": "adaptive_probing",
    "GatherAnchors": "gather_anchors",
    "PyramidRoIAlign": "pyramid_roi_align",
    "SamplingMixing": "sampling_mixing",
}


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """`torch.ops.asag.*` -> functions that emit one ONNX node, for the exporter's `custom_translation_table`."""
    return {
        getattr(torch.ops.asag, _TORCH_NAMES[function.name]).default: _translation(function)
        for function in OP_FUNCTIONS
    }


def _translation(function: OnnxFunction) -> Callable[..., Any]:
    schema = op_schema(function)
    node = Op(asag_opset, function.name, schema)
    attributes = list(function.to_function_proto().attribute)  # in the order of the definition's arguments
    inputs = len(schema.inputs)

    def emit(*arguments: Any) -> Any:
        return node(*arguments[:inputs], **dict(zip(attributes, arguments[inputs:], strict=True)))

    return emit


def op_schema(function: OnnxFunction) -> OpSchema:
    """The op's ONNX schema, read off its body: each tensor may have its own type."""
    proto = function.to_function_proto()
    tensors = [*proto.input, *proto.output]
    constraints = [(f"T_{name}", _TENSOR_TYPES, f"type of {name}") for name in tensors]
    annotations = function.function.__annotations__
    return OpSchema(
        function.name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[OpSchema.FormalParameter(name, f"T_{name}") for name in proto.input],
        outputs=[OpSchema.FormalParameter(name, f"T_{name}") for name in proto.output],
        type_constraints=constraints,
        attributes=[OpSchema.Attribute(name, _ATTRIBUTE_TYPES[annotations[name]]) for name in proto.attribute],
    )
