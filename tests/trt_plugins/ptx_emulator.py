"""Compiles an op's kernel to PTX with NVRTC and runs it on numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from kernel_emulator import NUMPY_TYPES
from numpy.typing import NDArray
from ptx_machine import Machine
from ptx_memory import GlobalMemory
from ptx_program import Program, parse
from ptx_work import Work

from trt_plugins.compile import FIRST_WITH_TENSOR_CORES, compile_plan, supported_capabilities
from trt_plugins.launch import DeviceArray, prepare_call
from trt_plugins.plan import OPERATIONS, Plan


@cache
def _folder() -> Path:
    return Path(mkdtemp(prefix="asag-ptx-"))


def compiled(plan: Plan, capability: int) -> Program:
    """The plan's kernel for that compute capability, times ten; skips the test where NVRTC cannot compile for it."""
    try:
        known = supported_capabilities()
    except ValueError as error:
        pytest.skip(str(error))
    if capability not in known:
        pytest.skip(f"this NVRTC does not know compute capability {capability / 10}")
    return _parsed(compile_plan(plan, capability, ptx=True, cache_folder=_folder()).image)


@lru_cache
def _parsed(image: bytes) -> Program:
    return parse(image.decode())


def run_ptx(
    name: str,
    inputs: Sequence[NDArray[Any]],
    attributes: Mapping[str, Any] | None = None,
    element: str = "float32",
    channels_last: bool = False,
    tensor_cores: bool = False,
    capability: int = 90,
    work: Work | None = None,
) -> list[NDArray[Any]]:
    """Run op `name` as compiled for `capability`; feature maps are given as [B, C, H, W].

    work: where instructions and memory accesses are counted.

    Raises KernelFaultError for what a GPU leaves undefined, and where a byte of an output is not written exactly once.
    """
    tensor_cores = tensor_cores and capability >= FIRST_WITH_TENSOR_CORES
    operation = OPERATIONS[name]
    contents, axes = [], (0, 2, 3, 1)
    for tensor, array in zip(operation.inputs, inputs, strict=True):
        assert array.dtype == NUMPY_TYPES[tensor.resolve(element)], tensor.name
        contents.append(np.ascontiguousarray(array.transpose(axes) if tensor.pyramid and channels_last else array))
    shapes = operation.output_shapes([array.shape for array in inputs], attributes or {})
    dtypes = [np.dtype(NUMPY_TYPES[tensor.resolve(element)]) for tensor in operation.outputs]
    sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    memory = GlobalMemory(contents, sizes, work)
    given = [
        DeviceArray(pointer, array.shape, tensor.resolve(element))
        for tensor, array, pointer in zip(operation.inputs, inputs, memory.pointers, strict=False)
    ]
    if channels_last:
        given = [
            array.as_channels_last() if tensor.pyramid else array
            for tensor, array in zip(operation.inputs, given, strict=True)
        ]
    wanted = [
        DeviceArray(pointer, tuple(shape), tensor.resolve(element))
        for tensor, shape, pointer in zip(operation.outputs, shapes, memory.pointers[len(inputs) :], strict=True)
    ]
    call = prepare_call(name, given, wanted, attributes or {}, tensor_cores)
    Machine(compiled(call.plan, capability), call.plan.grid, call.plan.threads, memory).run(call.arguments())
    return [
        memory.output(index).view(dtype).reshape(shape)
        for index, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True))
    ]
