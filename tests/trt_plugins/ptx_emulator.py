"""Compiles an op's kernel to PTX with NVRTC and runs it on numpy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from kernel_emulator import Arrays, run_on_arrays
from numpy.typing import NDArray
from ptx_machine import Machine
from ptx_memory import GlobalMemory
from ptx_program import Program, parse
from ptx_work import Work

from trt_plugins.compile import FIRST_WITH_TENSOR_CORES, compile_plan, supported_capabilities
from trt_plugins.launch import ITEM_SIZES, Call, DeviceArray, prepare_call
from trt_plugins.plan import Plan


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

    def launch(given: Arrays, wanted: Arrays) -> None:
        launch_ptx(name, given, wanted, attributes or {}, tensor_cores, capability, work)

    return run_on_arrays(launch, name, inputs, attributes or {}, element, channels_last)


def launch_ptx(
    name: str,
    inputs: Arrays,
    outputs: Arrays,
    attributes: Mapping[str, Any],
    tensor_cores: bool = True,
    capability: int = 90,
    work: Work | None = None,
) -> None:
    """As `trt_plugins.launch.launch`, on arrays in the memory of this process."""
    tensor_cores = tensor_cores and capability >= FIRST_WITH_TENSOR_CORES
    call = prepare_call(name, inputs, outputs, attributes, tensor_cores)
    contents = [np.frombuffer(ctypes.string_at(array.pointer, _size(array)), np.uint8) for array in inputs]
    memory = GlobalMemory(contents, [_size(array) for array in outputs], work)
    placed = Call(call.plan, tuple(memory.pointers[: len(inputs)]), tuple(memory.pointers[len(inputs) :]))
    Machine(compiled(call.plan, capability), call.plan.grid, call.plan.threads, memory).run(placed.arguments())
    for index, array in enumerate(outputs):
        ctypes.memmove(array.pointer, memory.output(index).tobytes(), _size(array))


def _size(array: DeviceArray) -> int:
    return int(np.prod(array.shape)) * ITEM_SIZES[array.type]
