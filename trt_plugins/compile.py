"""Kernels to PTX or machine code with NVRTC, on any machine, with or without a GPU; results are kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from asag.trt_plugins.plan import Plan

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten, that the kernels are checked for."""

FIRST_WITH_TENSOR_CORES = 80
"""Earlier tensor cores lack the instruction that the kernels use."""

CACHE_VARIABLE = "ASAG_KERNEL_CACHE"
"""Environment variable that names the folder of compiled kernels."""

_HEADER = "device.cuh"
_OPTIONS = ("--std=c++17", "--ptxas-options=-v")
_RESOURCES = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one architecture."""

    kernel: str
    """Name of the entry point."""
    image: bytes
    """Machine code (cubin), or PTX text that ends in a null byte."""
    log: str
    """What the compiler said."""


@dataclass(frozen=True)
class Usage:
    """What one thread and one block of a kernel take."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    """Stores and loads together; 0 where everything stays in registers."""


def compile_plan(plan: Plan, capability: int, ptx: bool = False) -> CompiledKernel:
    """Compile the plan's kernel for compute capability `capability`/10, such as 90 for 9.0.

    ptx: PTX for that capability and every later one, which the driver finishes, instead of machine code.
    Results are kept in the folder that ASAG_KERNEL_CACHE names, else in the user's cache folder.
    Raises ValueError with the source line and the compiler's message when it does not compile.
    """
    architecture = f"{'compute' if ptx else 'sm'}_{capability}"
    options = (f"--gpu-architecture={architecture}", *_OPTIONS, *(f"-D{key}={value}" for key, value in plan.defines))
    file_name = f"{plan.kernel}.cu"
    source, header = kernel_source(file_name), kernel_source(_HEADER)
    key = hashlib.sha256(json.dumps([source, header, options, nvrtc_version()]).encode()).hexdigest()[:32]
    path = cache_folder() / f"{plan.kernel}-{key}.{'ptx' if ptx else 'cubin'}"
    log_path = path.with_suffix(".log")
    if path.is_file() and log_path.is_file():
        return CompiledKernel(plan.kernel, path.read_bytes(), log_path.read_text())
    image, log = _compile(source, header, file_name, options, ptx)
    _write(log_path, log.encode())
    _write(path, image)
    return CompiledKernel(plan.kernel, image, log)


def resource_usage(plan: Plan, capability: int) -> Usage:
    """Registers, shared memory and spills of the plan's kernel as machine code, read off the assembler's report."""
    log = compile_plan(plan, capability).log
    found = _RESOURCES.search(log)
    if found is None:
        raise ValueError(f"the assembler reported no resources for {plan.kernel}; its output was: {log.strip()!r}")
    shared = _SHARED.search(log, found.start())
    return Usage(
        registers=int(found["registers"]),
        shared_bytes=int(shared[1]) if shared else 0,
        stack_bytes=int(found["stack"]),
        spill_bytes=int(found["stores"]) + int(found["loads"]),
    )


def kernel_source(file_name: str) -> str:
    """Text of a file of the package's `kernels`."""
    return (resources.files("asag.trt_plugins") / "kernels" / file_name).read_text()


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asag" / "kernels"


@cache
def nvrtc_version() -> str:
    """Version of the compiler. Raises ValueError where it is not installed."""
    return ".".join(str(part) for part in _nvrtc_call("nvrtcVersion"))


@cache
def supported_capabilities() -> frozenset[int]:
    """What the installed compiler can compile for."""
    return frozenset(_nvrtc_call("nvrtcGetSupportedArchs")[0])


def _compile(source: str, header: str, name: str, options: tuple[str, ...], ptx: bool) -> tuple[bytes, str]:
    arguments = (source.encode(), name.encode(), 1, [header.encode()], [_HEADER.encode()])
    (program,) = _nvrtc_call("nvrtcCreateProgram", *arguments)
    nvrtc = _nvrtc()
    try:
        encoded = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        log = _read(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise ValueError(f"{name} does not compile with {' '.join(options)}:\n{log or status.name}")
        return _read(program, "nvrtcGetPTX" if ptx else "nvrtcGetCUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(program: object, what: str) -> bytes:
    (size,) = _nvrtc_call(f"{what}Size", program)
    text = bytes(size)
    _nvrtc_call(what, program, text)
    return text


def _nvrtc_call(name: str, *arguments: object) -> tuple:
    status, *values = getattr(_nvrtc(), name)(*arguments)
    if status.value != 0:
        raise ValueError(f"{name} failed: {status.name}")
    return tuple(values)


def _nvrtc():  # type: ignore[no-untyped-def]  # a module
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            "compiling kernels needs NVRTC, which comes with PyTorch's CUDA build; "
            "else: pip install cuda-bindings nvidia-cuda-nvrtc"
        ) from error
    return nvrtc


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all; two processes may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
