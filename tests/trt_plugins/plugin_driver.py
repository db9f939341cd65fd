"""Drives a plugin instance through TensorRT's protocol as a builder would, with an expression builder of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from asag.trt_plugins.operations import OPERATIONS

TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "bool": "BOOL", "int32": "INT32", "int64": "INT64"}


@dataclass
class Embedded:
    """What a plugin puts into an engine, with symbols replaced by numbers."""

    output_types: list[Any]
    output_shapes: list[tuple[int, ...]]
    kernel: str
    image: bytes
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    scalars: tuple[int, ...]


class Expression:
    """A dimension: a number, constant as long as the symbolic batch has no part in it, as in a real builder."""

    def __init__(self, value: int, constant: bool = True) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant, "the value of a symbol is not known at build time"
        return self.value


class ExpressionBuilder:
    """TensorRT's interface for arithmetic with dimensions."""

    def __init__(self, trt: ModuleType) -> None:
        kind = trt.DimensionOperation
        self.functions: dict[Any, Callable[[int, int], int]] = {
            kind.SUM: lambda one, other: one + other,
            kind.SUB: lambda one, other: one - other,
            kind.PROD: lambda one, other: one * other,
            kind.FLOOR_DIV: lambda one, other: one // other,
            kind.CEIL_DIV: lambda one, other: -(-one // other),
            kind.MAX: max,
            kind.MIN: min,
        }

    def constant(self, value: int) -> Expression:
        return Expression(value)

    def operation(self, kind: Any, one: Expression, other: Expression) -> Expression:
        return Expression(self.functions[kind](one.value, other.value), one.constant and other.constant)


def with_expressions(monkeypatch: pytest.MonkeyPatch, trt: ModuleType) -> None:
    """Let `tensorrt.plugin` take :class:`Expression`: its own expressions can only be made by a real builder."""
    monkeypatch.setattr(trt, "IDimensionExpr", Expression)
    monkeypatch.setattr(trt, "DimsExprs", lambda length: [None] * length)
    internals = importlib.import_module("tensorrt.plugin").TensorDesc.__module__
    monkeypatch.setattr(sys.modules[internals], "SymExprImpl", lambda scalar: scalar._expr)


class _Scalars(dict[int, Expression]):
    nbSymExprs = 0  # noqa: N815  # TensorRT's name


def embed(
    trt: ModuleType,
    plugin: Any,
    name: str,
    shapes: Sequence[Sequence[int | None]],
    batch: int,
    element: str = "float32",
    channels_last: bool = False,
) -> Embedded:
    """Take a plugin through a build. None in a shape is the symbolic batch, for which `batch` is used in the end."""
    operation = OPERATIONS[name]
    kinds = [getattr(trt.DataType, TYPES[tensor.resolve(element)]) for tensor in operation.inputs]
    output_types = plugin.get_output_data_types(kinds, [len(shape) for shape in shapes])
    expressions = [
        [Expression(batch, constant=False) if side is None else Expression(side) for side in shape] for shape in shapes
    ]
    builder = ExpressionBuilder(trt)
    output_shapes = plugin.get_output_shapes(expressions, [], builder)

    last = trt.TensorFormat.HWC if element == "float32" else trt.TensorFormat.HWC8
    tensors = []
    for tensor, kind, shape in zip(operation.inputs, kinds, expressions, strict=True):
        tensors.append(_tensor(trt, kind, shape, last if channels_last and tensor.pyramid else trt.TensorFormat.LINEAR))
    for kind, shape in zip(output_types, output_shapes, strict=True):
        tensors.append(_tensor(trt, kind, shape, trt.TensorFormat.LINEAR))
    chosen = [(tensor.desc.type, tensor.desc.format) for tensor in tensors]
    supported = plugin.get_supported_format_combinations(tensors, len(shapes))
    offered = [(tensor.type, tensor.format) for tensor in supported]
    step = len(tensors)
    assert chosen in [offered[start : start + step] for start in range(0, len(offered), step)]

    inputs, outputs = tensors[: len(shapes)], tensors[len(shapes) :]
    plugin.configure_plugin(inputs, outputs)
    assert plugin.get_valid_tactics() == []
    plugin.set_tactic(0)
    parameters, scalars = SimpleNamespace(), _Scalars()
    plugin.get_launch_params(expressions, tensors, len(shapes), parameters, scalars, builder)
    kernel, image = plugin.get_kernel([tensor.desc for tensor in inputs], [tensor.desc for tensor in outputs])
    assert sorted(scalars) == list(range(scalars.nbSymExprs))
    return Embedded(
        output_types=output_types,
        output_shapes=[tuple(side.value for side in shape) for shape in output_shapes],
        kernel=kernel,
        image=image,
        grid=(parameters.grid_x.value, parameters.grid_y.value, parameters.grid_z.value),
        block=(parameters.block_x.value, parameters.block_y.value, parameters.block_z.value),
        shared_bytes=parameters.shared_mem.value,
        scalars=tuple(scalars[index].value for index in range(scalars.nbSymExprs)),
    )


def _tensor(trt: ModuleType, kind: Any, shape: Sequence[Expression], layout: Any) -> Any:
    tensor = trt.DynamicPluginTensorDesc()
    desc = trt.PluginTensorDesc()
    desc.type, desc.format = kind, layout
    desc.dims = trt.Dims([side.value if side.constant else -1 for side in shape])
    tensor.desc = desc
    return tensor


def create(trt: ModuleType, name: str, attributes: Mapping[str, Any], ahead_of_time: bool = True) -> Any:
    """A plugin made by the creator in the real registry, with the field types that an ONNX node has."""
    creator = trt.get_plugin_registry().get_creator(name, "1", "asag")
    assert creator is not None
    fields = []
    for key, value in attributes.items():
        if isinstance(value, tuple):
            fields.append(trt.PluginField(key, np.array(value, np.int32), trt.PluginFieldType.INT32))
        elif isinstance(value, int):
            fields.append(trt.PluginField(key, np.array([value], np.int32), trt.PluginFieldType.INT32))
        else:
            fields.append(trt.PluginField(key, np.array([value], np.float32), trt.PluginFieldType.FLOAT32))
    request = trt.QuickPluginCreationRequest
    preference = request.STRICT_AOT if ahead_of_time else request.STRICT_JIT
    collection = trt.PluginFieldCollection(fields)
    return creator.create_plugin(name, "asag", collection, trt.TensorRTPhase.BUILD, preference)
