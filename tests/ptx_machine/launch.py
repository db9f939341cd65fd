"""Compiles an op's kernel to PTX with NVRTC and runs it on numpy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag.trt_plugins.compile import FIRST_WITH_TENSOR_CORES, compile_plan, supported_capabilities
from asag.trt_plugins.launch import ITEM_SIZES, Call, DeviceArray, prepare_call
from asag.trt_plugins.operations import OPERATIONS
from asag.trt_plugins.plan import Plan
from tests.ptx_machine.machine import Machine
from tests.ptx_machine.memory import GlobalMemory
from tests.ptx_machine.program import Program, parse
from tests.ptx_machine.work import Work

Arrays = Sequence[DeviceArray]

# bfloat16 travels as its bits.
NUMPY_TYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "bool": np.bool_,
    "int32": np.int32,
    "int64": np.int64,
}


def compiled(plan: Plan, capability: int) -> Program:
    """The plan's kernel for that compute capability, times ten; skips the test where NVRTC cannot compile for it."""
    try:
        known = supported_capabilities()
    except ValueError as error:
        pytest.skip(str(error))
    if capability not in known:
        pytest.skip(f"this NVRTC does not know compute capability {capability / 10}")
    return _parsed(compile_plan(plan, capability, ptx=True).image)


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
    backwards: bool = False,
) -> list[NDArray[Any]]:
    """Run op `name` as compiled for `capability`; feature maps are given as [B, C, H, W].

    work: where instructions and memory accesses are counted; backwards: as :class:`tests.ptx_machine.machine.Machine`.
    Raises KernelFaultError for what a GPU leaves undefined, and where a byte of an output is not written exactly once.
    """
    operation, attributes = OPERATIONS[name], attributes or {}
    memories, given = [], []
    for tensor, array in zip(operation.inputs, inputs, strict=True):
        kind = tensor.resolve(element)
        assert array.dtype == NUMPY_TYPES[kind], tensor.name
        axes = (0, 2, 3, 1) if tensor.pyramid and channels_last else tuple(range(array.ndim))
        memory = _aligned(np.ascontiguousarray(array.transpose(axes)))
        memories.append(memory)
        given.append(DeviceArray(memory.ctypes.data, array.shape, kind, memory.transpose(np.argsort(axes)).strides))
    outputs, wanted = [], []
    shapes = operation.output_shapes([array.shape for array in inputs], attributes)
    for tensor, shape in zip(operation.outputs, shapes, strict=True):
        kind = tensor.resolve(element)
        output = _aligned(np.zeros(tuple(shape), NUMPY_TYPES[kind]))
        outputs.append(output)
        wanted.append(DeviceArray(output.ctypes.data, tuple(shape), kind))
    launch_ptx(name, given, wanted, attributes, tensor_cores, capability, work, backwards)
    return outputs


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy at an address that is a multiple of 64, as GPU allocations are."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    result = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


def launch_ptx(
    name: str,
    inputs: Arrays,
    outputs: Arrays,
    attributes: Mapping[str, Any],
    tensor_cores: bool = True,
    capability: int = 90,
    work: Work | None = None,
    backwards: bool = False,
) -> None:
    """As `trt_plugins.launch.launch`, on arrays in the memory of this process."""
    tensor_cores = tensor_cores and capability >= FIRST_WITH_TENSOR_CORES
    call = prepare_call(name, inputs, outputs, attributes, tensor_cores)
    contents = [np.frombuffer(ctypes.string_at(array.pointer, _size(array)), np.uint8) for array in inputs]
    memory = GlobalMemory(contents, [_size(array) for array in outputs], work)
    placed = Call(call.plan, tuple(memory.pointers[: len(inputs)]), tuple(memory.pointers[len(inputs) :]))
    machine = Machine(compiled(call.plan, capability), call.plan.grid, call.plan.threads, memory, backwards)
    machine.run(placed.arguments())
    for index, array in enumerate(outputs):
        ctypes.memmove(array.pointer, memory.output(index).tobytes(), _size(array))


def _size(array: DeviceArray) -> int:
    return int(np.prod(array.shape)) * ITEM_SIZES[array.type]
