"""The custom ops as TensorRT plugins, declared with the decorators of `tensorrt.plugin`.

Ahead of time (`aot_impl`) the kernel goes into the engine, which then needs neither Python nor this package. Just
in time (`impl`) the engine calls back into Python; for development. Needs TensorRT 10.13 or later.
"""

# Annotations are read at run time by the decorators, so they must not be postponed.
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from asag.trt_plugins.compile import FIRST_WITH_TENSOR_CORES, compile_plan
from asag.trt_plugins.launch import DeviceArray, current_capability, launch
from asag.trt_plugins.operations import DOMAIN, OPERATIONS, Operation
from asag.trt_plugins.plan import Plan, make_plan

_TYPE_NAMES = {
    "float32": ("FLOAT", "FP32"),
    "float16": ("HALF", "FP16"),
    "bfloat16": ("BF16", "BF16"),
    "bool": ("BOOL", "BOOL"),
    "int32": ("INT32", "INT32"),
    "int64": ("INT64", "INT64"),
}
"""In `tensorrt.DataType`, and in an autotune combination."""

# A scalar of an ONNX node arrives as an array of one element, which the bindings of TensorRT 10 hand to `int` or
# `float`; NumPy 2.4 and later refuse that. Declared as the array that it is, it arrives in every release.
_ATTRIBUTE_KINDS = {int: NDArray[np.int64], float: NDArray[np.float64], tuple: NDArray[np.int64]}

_CHANNELS_LAST_FORMATS = {"float32": "HWC", "float16": "HWC8", "bfloat16": "HWC8"}
_CHANNELS_OF_HWC8 = 8  # channels are padded to a multiple; the kernels know no padding

_registered: dict[str, int | None] = {}


def register_plugins(capability: int | None = None) -> tuple[str, ...]:
    """Register all ops with TensorRT's plugin registry; a second call does nothing. Returns the plugins' names.

    capability: compute capability times ten that kernels are compiled for; None takes the current device's, at the time
    an engine is built. Raises ValueError where TensorRT is missing or too old, or after a call for another capability.
    """
    try:
        import tensorrt as trt
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise ValueError(
            "the plugins need TensorRT 10.13 or later; install it as NVIDIA's documentation says"
        ) from error
    if not hasattr(trtp, "aot_impl"):
        raise ValueError(f"TensorRT {trt.__version__} cannot embed kernels of Python plugins; 10.13 or later can")
    if _registered:
        if _registered["capability"] != capability:
            raise ValueError(
                f"the plugins are registered for capability {_registered['capability']}; start a new process"
            )
    else:
        for operation in OPERATIONS.values():
            _register(trt, trtp, operation, capability)
        _registered["capability"] = capability
    return tuple(f"{DOMAIN}::{name}" for name in OPERATIONS)


def _register(trt: Any, trtp: Any, operation: Operation, capability: int | None) -> None:
    """Give TensorRT the four functions of one op. Their signatures are made from the op's description."""
    plugin = f"{DOMAIN}::{operation.name}"
    inputs = [tensor.name for tensor in operation.inputs]
    attributes = [name for name, _ in operation.attributes]
    first_attribute = len(inputs)

    def attributes_of(arguments: Sequence[Any]) -> dict[str, Any]:
        values = arguments[first_attribute : first_attribute + len(attributes)]
        return {
            name: tuple(np.asarray(value).ravel().tolist()) if kind is tuple else np.asarray(value).item()
            for (name, kind), value in zip(operation.attributes, values, strict=True)
        }

    def describe(*tensors: Any, **values: Any) -> tuple[Any, ...]:
        element = _element_of(trt, operation, tensors)
        numbers = attributes_of([*tensors, *values.values()])
        shapes = operation.output_shapes([tuple(tensor.shape_expr) for tensor in tensors], numbers)
        return tuple(
            trtp.from_shape_expr(tuple(shape), _data_type(trt, tensor.resolve(element)))
            for tensor, shape in zip(operation.outputs, shapes, strict=True)
        )

    def combinations(*arguments: Any) -> list[Any]:
        channels = arguments[0].shape_expr[1] if operation.maps else None
        return _combinations(trtp, operation, channels)

    def embed(*arguments: Any) -> tuple[str, bytes, Any, Any]:
        tensors, values = arguments[:first_attribute], attributes_of(arguments)
        target = capability or current_capability()
        plan = _plan_of(trt, operation, tensors, values, target)
        parameters = trtp.KernelLaunchParams(*plan.grid, block_x=plan.threads, shared_mem=0)
        scalars = trtp.SymIntExprs(len(plan.scalars))
        for index, scalar in enumerate(plan.scalars):
            scalars[index] = trtp.SymInt32(scalar)
        image = compile_plan(plan, target, ptx=True).image.rstrip(b"\0")
        return plan.kernel, image, parameters, scalars

    def execute(*arguments: Any, stream: int) -> None:
        tensors, outputs = arguments[:first_attribute], arguments[-1]
        arrays = [_device_array(trt, tensor) for tensor in (*tensors, *outputs)]
        launch(operation.name, arrays[: len(tensors)], arrays[len(tensors) :], attributes_of(arguments), stream)

    result = tuple[(trtp.TensorDesc,) * len(operation.outputs)]  # type: ignore[misc, valid-type]  # built at run time
    # Releases before 11 look for typing.Union.
    text = Union[str, bytes]  # noqa: UP007
    embedded = tuple[text, text, trtp.KernelLaunchParams, trtp.SymIntExprs]
    tensor_kinds = dict.fromkeys(inputs, trtp.TensorDesc)
    attribute_kinds = {name: _ATTRIBUTE_KINDS[kind] for name, kind in operation.attributes}
    trtp.register(plugin)(_with_signature(describe, {**tensor_kinds, **attribute_kinds}, result))
    trtp.autotune(plugin)(_with_signature(combinations, dict.fromkeys((*inputs, "outputs"))))
    trtp.aot_impl(plugin)(_with_signature(embed, dict.fromkeys((*inputs, *attributes, "outputs", "tactic")), embedded))
    trtp.impl(plugin)(_with_signature(execute, dict.fromkeys((*inputs, *attributes, "outputs", "stream"))))


def _with_signature(function: Callable[..., Any], parameters: dict[str, Any], result: Any = None) -> Callable[..., Any]:
    """Let `inspect.signature` see these parameters, by name with an annotation or None, and this result."""
    empty = inspect.Parameter.empty
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind or empty)
            for name, kind in parameters.items()
        ],
        return_annotation=result or empty,
    )
    return function


def _combinations(trtp: Any, operation: Operation, channels: Any) -> list[Any]:
    """Types and layouts that have a kernel: every element type row-major, and feature maps channels-last."""
    found = []
    tensors = (*operation.inputs, *operation.outputs)
    for element in operation.elements:
        types = ", ".join(_TYPE_NAMES[tensor.resolve(element)][1] for tensor in tensors)
        found.append(trtp.AutoTuneCombination(types, "LINEAR"))
        if operation.maps and channels.is_constant and channels.constant_value() % _CHANNELS_OF_HWC8 == 0:
            layout = _CHANNELS_LAST_FORMATS[element]
            layouts = ", ".join(layout if tensor.pyramid else "LINEAR" for tensor in tensors)
            found.append(trtp.AutoTuneCombination(types, layouts))
    return found


def _plan_of(trt: Any, operation: Operation, tensors: Sequence[Any], values: dict[str, Any], capability: int) -> Plan:
    return make_plan(
        operation.name,
        [tuple(tensor.shape_expr) for tensor in tensors],
        values,
        _element_of(trt, operation, tensors),
        channels_last=operation.maps > 0 and tensors[0].format != trt.TensorFormat.LINEAR,
        tensor_cores=capability >= FIRST_WITH_TENSOR_CORES,
    )


def _data_type(trt: Any, name: str) -> Any:
    return getattr(trt.DataType, _TYPE_NAMES[name][0])


def _type_name(trt: Any, data_type: Any) -> str:
    for name in _TYPE_NAMES:
        if _data_type(trt, name) == data_type:
            return name
    raise ValueError(f"tensors of type {data_type} have no kernel")


def _element_of(trt: Any, operation: Operation, tensors: Sequence[Any]) -> str:
    """Type of the feature maps; float32 for an op without any."""
    for tensor, given in zip(operation.inputs, tensors, strict=True):
        if tensor.type == "element":
            return _type_name(trt, given.dtype)
    return "float32"


def _device_array(trt: Any, tensor: Any) -> DeviceArray:
    array = DeviceArray(tensor.data_ptr, tuple(tensor.shape), _type_name(trt, tensor.dtype))
    return array if tensor.format == trt.TensorFormat.LINEAR else array.as_channels_last()
