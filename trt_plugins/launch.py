"""Runs the kernels on arrays that are on a GPU already, with cuda-bindings; nothing is copied.

Any object with `__cuda_array_interface__` will do (PyTorch, CuPy, pycuda's GPUArray), or a :class:`DeviceArray` made
from a pointer. The current CUDA context is used; where there is none, the first device's primary context.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from asag.trt_plugins.compile import FIRST_WITH_TENSOR_CORES, compile_plan
from asag.trt_plugins.operations import OPERATIONS, Tensor
from asag.trt_plugins.plan import Plan, make_plan

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "bool": 1, "int32": 4, "int64": 8}
_TYPES = {"f4": "float32", "f2": "float16", "V2": "bfloat16", "b1": "bool", "u1": "bool", "i4": "int32", "i8": "int64"}

ALIGNMENT = 16
"""Bytes; kernels move data in pieces of this size."""


@dataclass(frozen=True)
class DeviceArray:
    """Memory on a GPU."""

    pointer: int
    shape: tuple[int, ...]
    type: str
    """A key of :data:`ITEM_SIZES`."""
    strides: tuple[int, ...] | None = None
    """Bytes; None for row-major."""

    @classmethod
    def of(cls, array: Any) -> DeviceArray:
        """From an object with `__cuda_array_interface__`. Raises ValueError where it has none or an unknown type."""
        if isinstance(array, cls):
            return array
        description = getattr(array, "__cuda_array_interface__", None)
        if description is None:
            raise ValueError(f"{type(array).__name__} is no array on a GPU: it has no __cuda_array_interface__")
        kind = _TYPES.get(description["typestr"][1:])
        if kind is None:
            raise ValueError(f"arrays of type {description['typestr']} have no kernel")
        return cls(description["data"][0], tuple(description["shape"]), kind, description.get("strides"))

    @classmethod
    def of_tensor(cls, tensor: Any) -> DeviceArray:
        """From a PyTorch tensor, also of types that `__cuda_array_interface__` has no name for."""
        strides = tuple(step * tensor.element_size() for step in tensor.stride())
        return cls(tensor.data_ptr(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), strides)

    def is_row_major(self) -> bool:
        """Whether the last axis moves fastest and there are no gaps."""
        return self._has_order(range(len(self.shape)))

    def is_channels_last(self) -> bool:
        """Whether a [B, C, H, W] lies as [B, H, W, C]."""
        return len(self.shape) == 4 and self._has_order((0, 2, 3, 1))

    def as_channels_last(self) -> DeviceArray:
        """The same memory, said to lie as [B, H, W, C]; the shape stays [B, C, H, W]."""
        _, channels, height, width = self.shape
        size = ITEM_SIZES[self.type]
        strides = (channels * height * width * size, size, width * channels * size, channels * size)
        return DeviceArray(self.pointer, self.shape, self.type, strides)

    def _has_order(self, axes: Sequence[int]) -> bool:
        if self.strides is None:
            return list(axes) == sorted(axes)
        step = ITEM_SIZES[self.type]
        for axis in reversed(list(axes)):
            if self.shape[axis] != 1 and self.strides[axis] != step:
                return False
            step *= self.shape[axis]
        return True


@dataclass(frozen=True)
class Call:
    """A plan with the addresses of its tensors."""

    plan: Plan
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def arguments(self) -> Any:
        """What cuLaunchKernel wants: an array of pointers to the arguments' values, which it keeps alive."""
        values = [
            *(ctypes.c_void_p(pointer) for pointer in self.inputs),
            *(ctypes.c_int(scalar) for scalar in self.plan.scalars),
            *(ctypes.c_void_p(pointer) for pointer in self.outputs),
        ]
        array = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        array.values = values  # type: ignore[attr-defined]  # keeps them alive as long as the array
        return array


def launch(
    name: str,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    attributes: Mapping[str, Any] | None = None,
    stream: int = 0,
    tensor_cores: bool = True,
) -> None:
    """Run op `name` on `stream`, a CUDA stream's address; returns before it is done.

    inputs, outputs: arrays on the GPU in the order of the op's signature, row-major; P2..P5 may all be channels-last;
    tensor_cores: whether SamplingMixing may use them for 16-bit types. The first call of a kind compiles.
    Raises ValueError where an array does not fit the op, or CUDA refuses.
    """
    driver = _driver()
    context, capability = _current_context()
    call = prepare_call(name, inputs, outputs, attributes or {}, tensor_cores and capability >= FIRST_WITH_TENSOR_CORES)
    plan = call.plan
    function = _loaded(context, capability, plan.kernel, plan.defines, plan)
    arguments = call.arguments()
    _check(driver.cuLaunchKernel(function, *plan.grid, plan.threads, 1, 1, 0, stream, ctypes.addressof(arguments), 0))


def current_capability() -> int:
    """Compute capability of the current device, times ten. Raises ValueError where there is no GPU."""
    return _current_context()[1]


def prepare_call(
    name: str, inputs: Sequence[Any], outputs: Sequence[Any], attributes: Mapping[str, Any], tensor_cores: bool
) -> Call:
    """Check the arrays and find the plan for them; needs no GPU. Raises ValueError where an array does not fit."""
    operation = OPERATIONS[name]
    given = [DeviceArray.of(array) for array in inputs]
    wanted = [DeviceArray.of(array) for array in outputs]
    if len(given) != len(operation.inputs) or len(wanted) != len(operation.outputs):
        raise ValueError(f"{name} takes {len(operation.inputs)} inputs and {len(operation.outputs)} outputs")
    plan = plan_of(name, given, attributes, tensor_cores)
    expected = operation.output_shapes([array.shape for array in given], attributes)
    for tensor, array in zip(operation.inputs, given, strict=True):
        _check_array(plan, tensor, array, plan.channels_last)
    for tensor, array, shape in zip(operation.outputs, wanted, expected, strict=True):
        _check_array(plan, tensor, array, False)
        if array.shape != tuple(shape):
            raise ValueError(f"{name}: output {tensor.name} has shape {array.shape}, it must be {tuple(shape)}")
    return Call(plan, tuple(array.pointer for array in given), tuple(array.pointer for array in wanted))


def plan_of(name: str, arrays: Sequence[DeviceArray], attributes: Mapping[str, Any], tensor_cores: bool) -> Plan:
    """The plan that a launch of op `name` on these inputs runs, whatever types those that are no feature maps have.

    The maps' type is that of the first. tensor_cores: whether the device has those that the kernels use, and they may.
    Raises ValueError for what has no kernel.
    """
    inputs = list(zip(OPERATIONS[name].inputs, arrays, strict=True))
    element = next((array.type for tensor, array in inputs if tensor.type == "element"), "float32")
    maps = [array for tensor, array in inputs if tensor.pyramid]
    channels_last = not all(map_.is_row_major() for map_ in maps) and all(map_.is_channels_last() for map_ in maps)
    shapes = tuple(array.shape for array in arrays)
    return _remembered_plan(
        name, shapes, tuple(OPERATIONS[name].complete(attributes).items()), element, channels_last, tensor_cores
    )


@lru_cache(maxsize=1024)
def _remembered_plan(
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    attributes: tuple[tuple[str, Any], ...],
    element: str,
    channels_last: bool,
    tensor_cores: bool,
) -> Plan:
    return make_plan(name, shapes, dict(attributes), element, channels_last, tensor_cores)


def _check_array(plan: Plan, tensor: Tensor, array: DeviceArray, channels_last: bool) -> None:
    what = f"{plan.operation.name}: {tensor.name}"
    if array.type != tensor.resolve(plan.element):
        raise ValueError(f"{what} is {array.type}, it must be {tensor.resolve(plan.element)}")
    fits = array.is_channels_last() if channels_last and tensor.pyramid else array.is_row_major()
    if not fits:
        raise ValueError(
            f"{what} has strides {array.strides}; make it contiguous (feature maps all in one memory format)"
        )
    if array.pointer % ALIGNMENT and np.prod(array.shape) > 0:
        raise ValueError(f"{what} starts at an address that is no multiple of {ALIGNMENT}; copy it")


def _driver():  # type: ignore[no-untyped-def]  # a module
    try:
        from cuda.bindings import driver

        driver.cuDriverGetVersion()
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"launching kernels needs cuda-bindings and an NVIDIA driver: {error}") from error
    return driver


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status.value != 0:
        raise ValueError(f"CUDA refused: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _current_context() -> tuple[int, int]:
    """The context's address and its device's compute capability times ten."""
    driver = _driver()
    _check(driver.cuInit(0))
    context = _check(driver.cuCtxGetCurrent())
    if int(context) == 0:
        context = _check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(0))))
        _check(driver.cuCtxSetCurrent(context))
    return int(context), _capability(int(_check(driver.cuCtxGetDevice())))


@lru_cache
def _capability(device: int) -> int:
    driver = _driver()
    attribute = driver.CUdevice_attribute
    major = _check(driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
    minor = _check(driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
    return 10 * major + minor


_functions: dict[tuple[Any, ...], Any] = {}


def _loaded(context: int, capability: int, kernel: str, defines: tuple[tuple[str, str], ...], plan: Plan) -> Any:
    """The kernel in the context. Modules stay loaded for the life of the process."""
    key = (context, capability, kernel, defines)
    if key not in _functions:
        driver = _driver()
        module = _check(driver.cuModuleLoadData(compile_plan(plan, capability).image))
        _functions[key] = _check(driver.cuModuleGetFunction(module, kernel.encode()))
    return _functions[key]
