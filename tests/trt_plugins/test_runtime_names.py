"""What running an engine calls exists in the genuine bindings: the stand-ins of those tests are no invention."""

from __future__ import annotations

import inspect
from types import ModuleType

import numpy as np
import pytest

from tests.runtime.cuda_stand_in import StandInCuda
from tests.runtime.engine_stand_in import StandInContext


def check_names(module: ModuleType) -> None:
    for name, _ in inspect.getmembers(StandInContext, inspect.isfunction):
        assert name.startswith("_") or hasattr(module.IExecutionContext, name), name
    for name in (
        "create_engine_inspector",
        "create_execution_context",
        "get_device_memory_size_for_profile_v2",
        "get_tensor_dtype",
        "get_tensor_shape",
    ):
        assert hasattr(module.ICudaEngine, name), name
    assert "ExecutionContextAllocationStrategy" in module.ICudaEngine.create_execution_context.__doc__
    assert hasattr(module.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(module.LayerInformationFormat, "JSON")
    assert hasattr(module.Runtime, "deserialize_cuda_engine")
    for name, expected in (("UINT8", np.uint8), ("FLOAT", np.float32), ("INT64", np.int64), ("INT32", np.int32)):
        assert np.dtype(module.nptype(getattr(module.DataType, name))) == expected


def test_names_of_tensorrt(tensorrt: ModuleType) -> None:
    check_names(tensorrt)
    assert not hasattr(tensorrt, "CudaGraphStrategy")


def test_names_of_tensorrt_rtx() -> None:
    module = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed", exc_type=ImportError)
    check_names(module)
    assert hasattr(module.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE")
    for name in (
        "create_runtime_cache",
        "cuda_graph_strategy",
        "set_execution_context_allocation_strategy",
        "set_runtime_cache",
    ):
        assert hasattr(module.IRuntimeConfig, name), name


def test_functions_of_the_cuda_runtime() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    for name in dir(StandInCuda):
        if not name.startswith("cuda"):
            continue
        assert hasattr(runtime, name), name
        stand_in = getattr(StandInCuda, name)
        if inspect.isfunction(stand_in):
            arguments = getattr(runtime, name).__doc__.partition("(")[2].partition(")")[0]
            given = [part for part in arguments.split(",") if part.strip()]
            assert len(given) == len(inspect.signature(stand_in).parameters) - 1, name
        elif isinstance(stand_in, type):
            for member in stand_in.__members__:  # type: ignore[attr-defined]  # an enumeration
                assert hasattr(getattr(runtime, name), member), member
        else:
            assert int(getattr(runtime, name)) == stand_in, name
