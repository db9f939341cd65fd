"""What to time: the kernels of an op and everything they are compared with, on the same inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_plugins.benchmark.timing import ClockTimer, Sampler, Timer, first_line
from trt_plugins.launch import DeviceArray
from trt_plugins.operations import DOMAIN, OPERATIONS, Tensor
from trt_plugins.resources import Case

KERNEL, DEFINITION, TORCHVISION, ONNX_BODY = "kernel", "PyTorch definition", "torchvision", "ONNX body"
PYTHON, GRAPH, COLD = "from Python", "in a graph", "in a graph, caches empty"


@dataclass(frozen=True)
class Device:
    """Where to time, and with what; a test gives stand-ins."""

    name: str
    """PyTorch's name of it: "cuda", or "cpu" in tests."""
    timer: Timer
    launch: Callable[..., None]
    """`trt_plugins.launch.launch`."""
    onnx_provider: str
    """Execution provider of ONNX Runtime."""


@dataclass(frozen=True)
class Contender:
    """One way to do an op."""

    what: str
    how: str
    element: str
    """The type it computes in; the kernel's, unless it has none for that."""
    case: Case | None = None
    """For a kernel: which of the op's kernels."""
    sampler: Sampler | None = None
    reason: str = ""
    """Why there is no sampler."""


def find_contenders(
    cases: Sequence[Case], inputs: Sequence[NDArray[Any]], device: Device, compare: bool
) -> list[Contender]:
    """The kernels of `cases`, which differ in layout and use of tensor cores alone, and what they are compared with.

    inputs: arrays as `random_inputs` gives them. What cannot run is there with the reason, which also goes to stderr.
    """
    import torch

    tensors = [torch.from_numpy(array).to(device.name) for array in inputs]
    found = [contender for case in cases for contender in _kernels(case, tensors, device)]
    if compare:
        found += _pytorch(DEFINITION, cases[0], tensors, device, definition)
        if cases[0].name == "PyramidRoIAlign":
            found += _pytorch(TORCHVISION, cases[0], tensors, device, multi_scale_roi_align)
        found.append(_onnx_body(cases[0], tensors, device))
    for contender in found:
        if contender.sampler is None:
            kind = (contender.case or cases[0]).kind
            print(f"{cases[0].name} {kind}: {contender.what} {contender.how}: {contender.reason}", file=sys.stderr)
    return found


def random_inputs(case: Case) -> list[NDArray[Any]]:
    """numpy inputs of a case; feature maps in float32."""
    return OPERATIONS[case.name].sample(np.random.default_rng(0), case.shapes, case.attributes)


def definition(case: Case, tensors: Sequence[Any]) -> Callable[[], Any]:
    """The op's PyTorch definition on `tensors`."""
    from asag.ops.cuda import find_definition

    function = find_definition(OPERATIONS[case.name])
    return lambda: function(*tensors, **case.attributes)


def multi_scale_roi_align(case: Case, tensors: Sequence[Any]) -> Callable[[], Any]:
    """torchvision's RoIAlign over several levels, for the same boxes."""
    import torch
    from torchvision.ops import MultiScaleRoIAlign

    maps, boxes = dict(zip("0123", tensors[:4], strict=True)), tensors[4]
    corners = list(torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2), dim=-1))
    align = MultiScaleRoIAlign(list(maps), output_size=7, sampling_ratio=2)
    shape = [(4 * case.sizes.finest[0], 4 * case.sizes.finest[1])] * boxes.shape[0]
    return lambda: align(maps, corners, shape)


def op_model(
    name: str, shapes: Sequence[Sequence[int]], attributes: Mapping[str, Any], element: str = "float32"
) -> bytes:
    """A serialized ONNX model of one op's node with its body; `element` ("float32" or "float16") is the maps' type."""
    from onnx import TensorProto, helper

    from export.op_bodies import HELPER_FUNCTIONS, OP_FUNCTIONS
    from export.op_bodies.domain import DOMAIN_VERSION, OPSET_VERSION

    operation = OPERATIONS[name]
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bool": TensorProto.BOOL}
    types |= {"int32": TensorProto.INT32, "int64": TensorProto.INT64}

    def describe_values(tensors: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(tensor.name, types[tensor.resolve(element)], size)
            for tensor, size in zip(tensors, sizes, strict=True)
        ]

    inputs = describe_values(operation.inputs, shapes)
    outputs = describe_values(operation.outputs, operation.output_shapes(shapes, attributes))
    names = [value.name for value in inputs], [value.name for value in outputs]
    node = helper.make_node(name, names[0], names[1], domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], name, inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET_VERSION), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    bodies = [function.to_function_proto() for function in (*OP_FUNCTIONS, *HELPER_FUNCTIONS)]
    return helper.make_model(graph, functions=bodies, opset_imports=opsets, ir_version=10).SerializeToString()


def _kernels(case: Case, tensors: Sequence[Any], device: Device) -> list[Contender]:
    """A kernel in a graph, with warm and with empty caches, and started from Python."""
    starts = {GRAPH: device.timer.in_graph, COLD: device.timer.cold, PYTHON: device.timer.from_python}
    try:
        run = _kernel(case, tensors, device)
    except RuntimeError as error:  # not enough memory for its outputs
        return [Contender(KERNEL, how, case.element, case, reason=first_line(error)) for how in starts]
    return [_contender(KERNEL, how, case.element, start, run, case) for how, start in starts.items()]


def _kernel(case: Case, tensors: Sequence[Any], device: Device) -> Callable[[], None]:
    import torch

    operation = OPERATIONS[case.name]
    given = _in_types(case, tensors, case.element)
    for index, tensor in enumerate(operation.inputs):
        if tensor.pyramid and case.channels_last:
            given[index] = given[index].contiguous(memory_format=torch.channels_last)
    outputs = [
        torch.empty(tuple(shape), dtype=getattr(torch, tensor.resolve(case.element)), device=device.name)
        for tensor, shape in zip(operation.outputs, operation.output_shapes(case.shapes, case.attributes), strict=True)
    ]

    def run() -> None:
        arrays = [[DeviceArray.of_tensor(value) for value in values] for values in (given, outputs)]
        stream = torch.cuda.current_stream().cuda_stream if device.name == "cuda" else 0
        device.launch(case.name, *arrays, case.attributes, stream, case.tensor_cores)

    return run


def _pytorch(
    what: str,
    case: Case,
    tensors: Sequence[Any],
    device: Device,
    make: Callable[[Case, Sequence[Any]], Callable[[], Any]],
) -> list[Contender]:
    """PyTorch's steps from Python and in a graph, in the first types that they take.

    These are the kernel's own; where maps and coordinates must be of one type, that of the maps, since coarser
    coordinates take no longer; else float32. Maps are row-major, as grid_sample and RoIAlign want them.
    """
    import torch

    all_of_it = [value.to(getattr(torch, case.element)) if value.is_floating_point() else value for value in tensors]
    tried = [
        (case.element, _in_types(case, tensors, case.element)),
        (f"{case.element}, coordinates too", all_of_it),
        ("float32", list(tensors)),
    ]
    for element, given in tried:
        try:
            run = make(case, given)
            run()
        except Exception as error:  # whatever a library raises for a type that it does not take
            reason = first_line(error)
            continue
        return [
            _contender(what, PYTHON, element, device.timer.from_python, run),
            _contender(what, GRAPH, element, device.timer.in_graph, run),
        ]
    return [Contender(what, how, case.element, reason=reason) for how in (PYTHON, GRAPH)]


def _onnx_body(case: Case, tensors: Sequence[Any], device: Device) -> Contender:
    """The op's ONNX body in ONNX Runtime, all on the device; it returns when it is done, so the clock times it."""
    element = "float16" if case.element == "float16" else "float32"
    given = _in_types(case, tensors, element)

    def start(run: Callable[[], Any]) -> Sampler:
        import onnxruntime

        if device.onnx_provider not in onnxruntime.get_available_providers():
            raise RuntimeError(f"this ONNX Runtime has no {device.onnx_provider}")
        model = op_model(case.name, case.shapes, case.attributes, element)
        session = onnxruntime.InferenceSession(model, providers=[device.onnx_provider])
        if session.get_providers()[0] != device.onnx_provider:
            raise RuntimeError(f"{device.onnx_provider} did not start, its libraries may be missing")
        binding = session.io_binding()
        for value, tensor in zip(session.get_inputs(), given, strict=True):
            kind = getattr(np, str(tensor.dtype).removeprefix("torch.").replace("bool", "bool_"))
            binding.bind_input(value.name, device.name, 0, kind, tuple(tensor.shape), tensor.data_ptr())
        for value in session.get_outputs():
            binding.bind_output(value.name, device.name)
        return ClockTimer().from_python(lambda: (session.run_with_iobinding(binding), given))

    return _contender(ONNX_BODY, PYTHON, element, start, lambda: None)


def _contender(
    what: str,
    how: str,
    element: str,
    start: Callable[[Callable[[], Any]], Sampler],
    run: Callable[[], Any],
    case: Case | None = None,
) -> Contender:
    try:
        return Contender(what, how, element, case, start(run))
    except Exception as error:  # whatever a library raises: the other contenders still run
        return Contender(what, how, element, case, reason=first_line(error))


def _in_types(case: Case, tensors: Sequence[Any], element: str) -> list[Any]:
    import torch

    return [
        value.to(getattr(torch, tensor.resolve(element)))
        for tensor, value in zip(OPERATIONS[case.name].inputs, tensors, strict=True)
    ]
