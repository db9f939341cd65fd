"""How far each stage is from what the machine can do: the table behind `asag bench --limit`.

The limit of a stage is the longer of two times: its arithmetic at the rate of a large matrix product, and its bytes at
the rate of a large copy, both measured here. A convolution that saves arithmetic (Winograd) may pass it.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from asag.runtime.errors import BackendUnavailableError
from asag.runtime.onnx_file import read_onnx
from asag.runtime.speed.stage_times import StageTimes
from asag.runtime.speed.stage_work import StageWork, stage_work

PRECISIONS = ("fp32", "fp16", "bf16")
"""Those of which a rate is measured."""

_MATRIX_SIDE = 2048
_COPY_BYTES = 1 << 28
_CUDA_MATRIX_SIDE = 8192
_CUDA_COPY_BYTES = 1 << 30
"""Far larger than a GPU's caches."""
_SECONDS = 1.5
"""How long a rate is measured; the best run counts."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What ``device`` reaches: operations per second of a large matrix product of float32 and of 16-bit elements, and
    bytes per second, read and written, of a large copy.
    """

    device: str
    operations: float
    half_operations: float
    bytes: float

    def sentence(self) -> str:
        """One line for below a table."""
        half = "" if self.half_operations == self.operations else f", in 16 bits {self.half_operations / 1e9:.0f}"
        return (
            f"{self.device}: matrix products {self.operations / 1e9:.0f} GFLOP/s{half}, copies"
            f" {self.bytes / 1e9:.0f} GB/s"
        )


@dataclasses.dataclass(frozen=True)
class StageLimit:
    """Milliseconds that a stage takes and at least would, its work, and what binds: "arithmetic" or "memory".

    ``fraction`` is the part of its time that the limit is, 0 to 1; 1 would be perfect.
    """

    stage: str
    time_ms: float
    limit_ms: float
    fraction: float
    operations: float
    bytes: float
    bound_by: str


@dataclasses.dataclass(frozen=True)
class ModelLimits:
    """The stages of a model with the rates they are judged by, or the ``reason`` why there is nothing to judge."""

    name: str
    backend: str
    precision: str
    stages: tuple[StageLimit, ...] = ()
    rates: Rates | None = None
    reason: str | None = None


def stage_limit(work: StageWork, time_ms: float, rates: Rates) -> StageLimit:
    """Judge one stage."""
    arithmetic = work.operations / rates.operations + work.half_operations / rates.half_operations
    memory = work.bytes / rates.bytes
    limit_ms = max(arithmetic, memory) * 1e3
    return StageLimit(
        stage=work.stage,
        time_ms=time_ms,
        limit_ms=limit_ms,
        fraction=limit_ms / time_ms,
        operations=work.operations + work.half_operations,
        bytes=work.bytes,
        bound_by="arithmetic" if arithmetic >= memory else "memory",
    )


def model_limits(times: StageTimes, model: str | Path, batch_size: int, rates: Rates | None) -> ModelLimits:
    """Judge the stages of a model by its exported file; ``rates`` are those of the device that it ran on.

    They may be None where ``times`` holds a reason instead of times.

    Raises ValueError for a file that is no export of this project.
    """
    named = (times.name, times.backend, times.precision)
    if times.reason is not None:
        return ModelLimits(*named, reason=times.reason)
    assert rates is not None
    if times.precision not in PRECISIONS:
        return ModelLimits(*named, reason=f"no rate is measured for {times.precision}")
    work = stage_work(*read_onnx(model), batch_size)
    stages = tuple(stage_limit(item, times.p50_ms[item.stage], rates) for item in work if item.stage in times.p50_ms)
    return ModelLimits(*named, stages, rates)


def measure_rates(device: str, threads: int | None = None) -> Rates:
    """The rates of ``cpu`` with this number of threads, or of ``cuda`` or ``cuda:<index>``.

    On the CPU the matrix product is ONNX Runtime's, which uses wider instructions than numpy's on some machines, and
    16-bit numbers are computed in float32. Raises BackendUnavailableError where what measures is missing: ONNX Runtime
    and onnx, or PyTorch on a GPU.
    """
    if device != "cpu":
        return _cuda_rates(device)
    count = threads or _cores()
    operations = _cpu_matrix_rate(count)
    return Rates(f"CPU, {count} thread{'s' if count > 1 else ''}", operations, operations, _cpu_copy_rate(count))


def _cuda_rates(device: str) -> Rates:
    """Float32 products are those without TF32, 16-bit ones those of float16."""
    try:
        import torch
    except ModuleNotFoundError:
        raise BackendUnavailableError("a GPU's limits are measured with PyTorch: pip install torch") from None
    if not torch.cuda.is_available():
        raise BackendUnavailableError("PyTorch sees no CUDA GPU on this machine")
    side, rates = _CUDA_MATRIX_SIDE, []
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        for kind in (torch.float32, torch.float16):
            # Not zeros: on those a GPU draws less power and clocks higher.
            matrix = torch.randn((side, side), device=device, dtype=kind)
            rates.append(2.0 * side**3 / _best_cuda_seconds(partial(torch.mm, matrix, matrix)))
        source = torch.ones(_CUDA_COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        rates.append(2.0 * _CUDA_COPY_BYTES / _best_cuda_seconds(partial(target.copy_, source)))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return Rates(torch.cuda.get_device_name(device), *rates)


def _best_cuda_seconds(run: Callable[[], object]) -> float:
    """The fastest of twenty calls, between CUDA events."""
    import torch

    best = float("inf")
    for number in range(23):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        if number > 2:
            best = min(best, began.elapsed_time(ended) / 1e3)
    return best


def _cpu_matrix_rate(threads: int) -> float:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailableError(f"the limit needs onnx and ONNX Runtime: pip install {error.name}") from None
    side = _MATRIX_SIDE
    matrix = np.random.default_rng(0).random((side, side), np.float32)
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [side, side]) for name in ("a", "c")]
    product = onnx.helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = onnx.helper.make_graph([product], "g", value[:1], value[1:], [onnx.numpy_helper.from_array(matrix, "b")])
    opset = onnx.helper.make_opsetid("", 17)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session: Any = onnxruntime.InferenceSession(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    return 2.0 * side**3 / _best_seconds(lambda: session.run(None, {"a": matrix}))


def _cpu_copy_rate(threads: int) -> float:
    source = np.ones((threads, _COPY_BYTES // 8 // threads))
    target = np.zeros_like(source)
    with ThreadPoolExecutor(threads) as pool:  # copying releases the interpreter's lock
        return 2.0 * source.nbytes / _best_seconds(lambda: list(pool.map(np.copyto, target, source)))


def _best_seconds(run: Callable[[], Any]) -> float:
    run()
    best, until = float("inf"), time.perf_counter() + _SECONDS
    while True:
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        best = min(best, end - start)
        if end > until:
            return best


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
