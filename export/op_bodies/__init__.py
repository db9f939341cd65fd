"""ONNX bodies of the custom ops: the same arithmetic as the definitions in `asag.ops`, in standard operators.

Each body keeps to operators that every target implements (no NonMaxSuppression, NonZero, RoiAlign or GridSample) and
has no shape that depends on the data. A runtime that knows the op uses its kernel, any other inlines the body.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from onnx import FunctionProto, NodeProto, helper
from onnxscript import OnnxFunction

from asag.export.op_bodies import sampling_mixing
from asag.trt_plugins.operations import DOMAIN, OPERATIONS

OP_FUNCTIONS: tuple[OnnxFunction, ...] = tuple(
    getattr(import_module(f"asag.export.op_bodies.{operation.snake_name}"), operation.name)
    for operation in OPERATIONS.values()
)
"""Bodies; names of functions, parameters and attributes are those of the ONNX nodes."""


def _called(functions: Iterable[OnnxFunction]) -> tuple[OnnxFunction, ...]:
    """Functions that these call, each once."""
    found = (called for function in functions for called in function.function_ir.get_called_functions().values())
    return tuple({called.name: called for called in found}.values())


HELPER_FUNCTIONS: tuple[OnnxFunction, ...] = _called(OP_FUNCTIONS)
"""Functions that the bodies call."""

_SPECIALIZE = {"SamplingMixing": sampling_mixing.specialize}
"""Bodies that depend on attributes in ways that operators do not express."""


def bodies_of(nodes: Iterable[NodeProto]) -> list[FunctionProto]:
    """The functions to attach to a graph of these nodes: bodies of the ops among them, and what those call.

    Raises ValueError where nodes of one op ask for different bodies; a file has one for each.
    """
    attributes: dict[str, list[dict[str, Any]]] = {name: [] for name in OPERATIONS}
    for node in nodes:
        if node.domain == DOMAIN and node.op_type in OPERATIONS:
            attributes[node.op_type].append({each.name: helper.get_attribute_value(each) for each in node.attribute})
    used = [function for function in OP_FUNCTIONS if attributes[function.name]]
    functions = []
    for function in used:
        made = [_body(function, found) for found in attributes[function.name]]
        if any(body != made[0] for body in made):
            raise ValueError(f"nodes of {function.name} with attributes that need different bodies do not fit one file")
        functions += made[:1]
    return functions + [function.to_function_proto() for function in _called(used)]


def _body(function: OnnxFunction, attributes: dict[str, Any]) -> FunctionProto:
    body = function.to_function_proto()
    if function.name in _SPECIALIZE:
        _SPECIALIZE[function.name](body, OPERATIONS[function.name].complete(attributes))
    return body
