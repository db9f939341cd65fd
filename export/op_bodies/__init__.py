"""ONNX bodies of the custom ops: the same arithmetic as the definitions in `asag.ops`, in standard operators.

Each body keeps to operators that every target implements (no NonMaxSuppression, NonZero, RoiAlign or GridSample) and
has no shape that depends on the data. A runtime that knows the op uses its kernel, any other inlines the body.
"""

from importlib import import_module

from onnxscript import OnnxFunction

from trt_plugins.operations import OPERATIONS

OP_FUNCTIONS: tuple[OnnxFunction, ...] = tuple(
    getattr(import_module(f"export.op_bodies.{operation.snake_name}"), operation.name)
    for operation in OPERATIONS.values()
)
"""Bodies; names of functions, parameters and attributes are those of the ONNX nodes."""

HELPER_FUNCTIONS: tuple[OnnxFunction, ...] = tuple(
    {
        helper.name: helper
        for function in OP_FUNCTIONS
        for helper in function.function_ir.get_called_functions().values()
    }.values()
)
"""Functions that the bodies call."""
