"""What launching checks before it asks the driver."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asag.trt_plugins.compile import compile_plan
from asag.trt_plugins.launch import DeviceArray, launch, prepare_call
from asag.trt_plugins.operations import OPERATIONS
from asag.trt_plugins.plan import make_plan
from benchmarks.kernel_cases import DEMO, signature

ADDRESS = 4096


class Described:
    """An array of another library, on no GPU."""

    def __init__(self, shape: tuple[int, ...], typestr: str, strides: tuple[int, ...] | None = None) -> None:
        description: dict[str, Any] = {"shape": shape, "typestr": typestr, "data": (ADDRESS, False), "version": 3}
        self.__cuda_array_interface__ = description | ({"strides": strides} if strides is not None else {})


def arrays(name: str, element: str = "float32") -> tuple[list[DeviceArray], list[DeviceArray], dict[str, Any]]:
    operation = OPERATIONS[name]
    shapes, attributes = signature(name, DEMO)
    inputs = [
        DeviceArray(ADDRESS * index, shape, tensor.resolve(element))
        for index, (tensor, shape) in enumerate(zip(operation.inputs, shapes, strict=True), start=1)
    ]
    outputs = [
        DeviceArray(-ADDRESS * index, tuple(shape), tensor.resolve(element))
        for index, (tensor, shape) in enumerate(
            zip(operation.outputs, operation.output_shapes(shapes, attributes), strict=True), start=1
        )
    ]
    return inputs, outputs, attributes


@pytest.mark.parametrize("typestr", ["<f4", "<f2", "<V2", "|b1", "|u1", "<i4", "<i8"])
def test_arrays_of_other_libraries_are_understood(typestr: str) -> None:
    array = DeviceArray.of(Described((2, 3), typestr))
    assert (array.pointer, array.shape) == (ADDRESS, (2, 3))
    assert array.is_row_major()
    assert DeviceArray.of(array) is array


def test_what_is_no_array_on_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="ndarray is no array on a GPU"):
        DeviceArray.of(np.zeros(3))
    with pytest.raises(ValueError, match="<c8 have no kernel"):
        DeviceArray.of(Described((2,), "<c8"))


def test_memory_orders() -> None:
    plain = DeviceArray(0, (2, 3, 4, 5), "float16")
    assert plain.is_row_major()
    assert not plain.is_channels_last()
    turned = plain.as_channels_last()
    assert turned.is_channels_last()
    assert not turned.is_row_major()
    assert not DeviceArray(0, (4, 4), "float32", (4, 16)).is_row_major()
    one_cell = DeviceArray(0, (1, 8, 1, 1), "float32")
    assert one_cell.is_row_major()
    assert one_cell.as_channels_last().is_row_major()


def test_arguments_are_pointers_scalars_pointers() -> None:
    inputs, outputs, attributes = arrays("SamplingMixing")
    call = prepare_call("SamplingMixing", inputs, outputs, attributes, tensor_cores=False)
    packed = call.arguments()
    values = [ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint64)).contents.value for pointer in packed[:6]]
    assert values == [array.pointer for array in inputs]
    scalars = [ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int)).contents.value for pointer in packed[6:15]]
    assert scalars == [100, 80, 80, 40, 40, 20, 20, 10, 10]
    (last,) = packed[15:]
    assert ctypes.cast(last, ctypes.POINTER(ctypes.c_int64)).contents.value == outputs[0].pointer


def test_feature_maps_may_be_channels_last_but_not_mixed() -> None:
    inputs, outputs, attributes = arrays("PyramidRoIAlign", "float16")
    turned = [array.as_channels_last() for array in inputs[:4]]
    call = prepare_call("PyramidRoIAlign", [*turned, inputs[4]], outputs, attributes, tensor_cores=True)
    assert ("CHANNELS_LAST", "1") in call.plan.defines
    with pytest.raises(ValueError, match=r"PyramidRoIAlign: p2 has strides .* one memory format"):
        prepare_call("PyramidRoIAlign", [turned[0], *inputs[1:]], outputs, attributes, tensor_cores=True)


def test_tensor_cores_serve_16_bit_types_only() -> None:
    for element, expected in (("float32", "0"), ("float16", "1"), ("bfloat16", "1")):
        inputs, outputs, attributes = arrays("SamplingMixing", element)
        call = prepare_call("SamplingMixing", inputs, outputs, attributes, tensor_cores=True)
        assert ("TENSOR_CORES", expected) in call.plan.defines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "float16"}, "GatherAnchors: anchors is float16, it must be float32"),
        ({"pointer": 8}, "no multiple of 16"),
        ({"strides": (4, 4, 4)}, "anchors has strides"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    inputs, outputs, attributes = arrays("GatherAnchors")
    inputs[0] = DeviceArray(**({field: getattr(inputs[0], field) for field in DeviceArray.__annotations__} | change))
    with pytest.raises(ValueError, match=message):
        prepare_call("GatherAnchors", inputs, outputs, attributes, tensor_cores=False)


def test_an_output_of_another_shape_is_refused() -> None:
    inputs, outputs, attributes = arrays("GatherAnchors")
    with pytest.raises(ValueError, match=r"output boxes has shape \(1, 100, 4\), it must be \(1, 50, 4\)"):
        prepare_call("GatherAnchors", inputs, outputs, {**attributes, "most": 50}, tensor_cores=False)
    with pytest.raises(ValueError, match="takes 2 inputs and 2 outputs"):
        prepare_call("GatherAnchors", inputs[:1], outputs, attributes, tensor_cores=False)


def test_without_a_gpu_launching_says_what_is_missing() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        inputs, outputs, attributes = arrays("GatherAnchors")
        with pytest.raises(ValueError, match="needs cuda-bindings and an NVIDIA driver"):
            launch("GatherAnchors", inputs, outputs, attributes)
    else:
        pytest.skip("this machine has a driver")


LAUNCH_SCRIPT = """
from asag.trt_plugins.compile import compile_plan
from asag.trt_plugins.launch import DeviceArray, launch
inputs = [DeviceArray({address}, (2, 340, 5), "float32"), DeviceArray(8192, (2, 340), "bool")]
outputs = [DeviceArray(16384, (2, 100, 4), "float32"), DeviceArray(32768, (2, 100), "bool")]
for stream in (0, 77):
    launch("GatherAnchors", inputs, outputs, {attributes}, stream)
"""


def test_the_driver_gets_what_the_plan_says(tmp_path: Path, compiler: None) -> None:
    # The genuine cuda-bindings, over a library that prints what it is asked.
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path / "libcuda.so.1"
    source = Path(__file__).with_name("stand_in_driver.c")
    link = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library), "-ldl"]
    subprocess.run([compiler, *link], check=True)
    attributes = {"first": 100, "keep_threshold": 0.1, "fewest": 5, "most": 100}
    plan = make_plan("GatherAnchors", [(2, 340, 5), (2, 340)], attributes)
    compile_plan(plan, 90)  # the compiler looks for a driver too, and would believe this one
    script = LAUNCH_SCRIPT.format(address=ADDRESS, attributes=attributes)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    launched = f"launch {plan.grid} ({plan.threads}, 1, 1) 0"
    lines = ["load ELF", "find gather_anchors", f"{launched} 0 {ADDRESS}", f"{launched} 77 {ADDRESS}"]
    assert result.stdout.splitlines() == lines


def test_the_room_starts_without_pytorch_and_tensorrt() -> None:
    script = (
        "import sys, trt_plugins.launch, trt_plugins.plugins\n"
        "print([name for name in ('torch', 'tensorrt', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
