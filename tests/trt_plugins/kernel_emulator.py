"""Compiles a kernel's source as C++ with `emulation.h` and runs it on numpy arrays."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import trt_plugins
from trt_plugins.launch import DeviceArray, prepare_call
from trt_plugins.operations import OPERATIONS

HERE = Path(__file__).parent
KERNELS = Path(trt_plugins.__file__).parent / "kernels"
GUARD = 64
"""Bytes on either side of an output that must stay as they were."""

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


def compiler() -> str:
    """A C++ compiler, or skip the test."""
    found = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if found is None:
        pytest.skip("emulating kernels needs a C++ compiler")
    return found


@cache
def _folder() -> Path:
    return Path(mkdtemp(prefix="asag-emulation-"))


@cache
def _library(kernel: str, defines: tuple[tuple[str, str], ...]) -> ctypes.CDLL:
    name = hashlib.sha256(repr((kernel, defines)).encode()).hexdigest()[:16]
    source, library = _folder() / f"{name}.cpp", _folder() / f"{name}.so"
    source.write_text(
        '#include "emulation.h"\n'
        f'#include "{kernel}.cu"\n'
        'extern "C" const char* emulate(const unsigned* grid, unsigned threads, void** arguments, int backwards) {\n'
        f"    return emulation::launch({kernel}, grid, threads, arguments, backwards);\n"
        "}\n"
    )
    command = [compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-w"]
    command += [f"-D{key}={value}" for key, value in defines]
    command += ["-I", str(HERE), "-I", str(KERNELS), str(source), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.emulate.restype = ctypes.c_char_p
    return loaded


def emulate(
    name: str,
    inputs: Sequence[NDArray[Any]],
    attributes: Mapping[str, Any] | None = None,
    element: str = "float32",
    channels_last: bool = False,
    tensor_cores: bool = False,
    backwards: bool = False,
) -> list[NDArray[Any]]:
    """Run op `name`; feature maps are given as [B, C, H, W] and laid out channels-last here where asked.

    Also checks that every output element is written and nothing around the outputs is.
    """

    def launch(given: Arrays, wanted: Arrays) -> None:
        call = prepare_call(name, given, wanted, attributes or {}, tensor_cores)
        assert dict(call.plan.defines).get("CHANNELS_LAST", "0") == str(int(channels_last))
        grid = (ctypes.c_uint * 3)(*call.plan.grid)
        library = _library(call.plan.kernel, call.plan.defines)
        failure = library.emulate(grid, call.plan.threads, call.arguments(), int(backwards))
        assert failure is None, failure.decode()

    runs = [
        run_on_arrays(launch, name, inputs, attributes or {}, element, channels_last, fill) for fill in (0xA5, 0x5A)
    ]
    for first, second in zip(*runs, strict=True):
        assert first.tobytes() == second.tobytes(), f"{name} leaves part of an output unwritten"
    return runs[0]


def run_on_arrays(
    launch: Callable[[Arrays, Arrays], None],
    name: str,
    inputs: Sequence[NDArray[Any]],
    attributes: Mapping[str, Any],
    element: str,
    channels_last: bool,
    fill: int = 0xA5,
) -> list[NDArray[Any]]:
    """The outputs of `launch`, which gets inputs and outputs as arrays in the memory of this process."""
    operation = OPERATIONS[name]
    memories, given = [], []
    for tensor, array in zip(operation.inputs, inputs, strict=True):
        kind = tensor.resolve(element)
        assert array.dtype == NUMPY_TYPES[kind], tensor.name
        axes = (0, 2, 3, 1) if tensor.pyramid and channels_last else tuple(range(array.ndim))
        memory = _aligned(np.ascontiguousarray(array.transpose(axes)))
        strides = memory.transpose(np.argsort(axes)).strides
        memories.append(memory)
        given.append(DeviceArray(memory.ctypes.data, array.shape, kind, strides))
    outputs, wanted = [], []
    shapes = operation.output_shapes([array.shape for array in inputs], attributes)
    for tensor, shape in zip(operation.outputs, shapes, strict=True):
        kind = tensor.resolve(element)
        dtype = np.dtype(NUMPY_TYPES[kind])
        size = int(np.prod(shape)) * dtype.itemsize
        memory = _aligned(np.full(size + 2 * GUARD, fill, np.uint8))
        outputs.append((memory, size, dtype, shape))
        wanted.append(DeviceArray(memory.ctypes.data + GUARD, tuple(shape), kind))
    launch(given, wanted)
    arrays = []
    for memory, size, dtype, shape in outputs:
        around = np.concatenate((memory[:GUARD], memory[GUARD + size :]))
        assert (around == fill).all(), f"{name} writes outside an output"
        arrays.append(memory[GUARD : GUARD + size].view(dtype).reshape(shape).copy())
    return arrays


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy at an address that is a multiple of 64, as GPU allocations are."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    result = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result
