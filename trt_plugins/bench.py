"""Times the kernels on this machine's GPU: `python -m trt_plugins.bench`.

Per op, type and layout: the kernel's time, how far it is from what the GPU could do, and how much faster it is than the
PyTorch definition, than torchvision where that has the op, and than the ONNX body on ONNX Runtime's CUDA provider. The
measuring side needs PyTorch; the kernels do not.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trt_plugins.launch import DeviceArray, launch
from trt_plugins.plan import OPERATIONS, Tensor
from trt_plugins.resources import DEMO, PUBLISHED, Case, Sizes, cases

LAUNCHES = 20
"""Launches in one CUDA graph, so that the time of starting them from Python does not count."""
REPEATS = 20
FLOAT_LANES = 128
"""Float multiply-adds per multiprocessor and clock, on compute capability 8.6 and later and on 9.0."""


@dataclass(frozen=True)
class Limits:
    """What this GPU can do, measured where it can be."""

    name: str
    bytes_per_second: float
    """Read and written while copying."""
    float_operations: float
    """Float32 operations per second outside tensor cores, from clock and multiprocessors."""
    half_operations: float
    """Operations per second of a large float16 matrix product."""


@dataclass(frozen=True)
class Row:
    """One line of the table; times in microseconds, None where not measured."""

    case: Case
    batch: int
    kernel: float
    limit: float
    definition: float | None
    torchvision: float | None
    onnx_body: float | None


def random_inputs(case: Case) -> list[Any]:
    """numpy inputs of a case: boxes and points spread over the image, feature maps in float32."""
    random = np.random.default_rng(0)
    height, width = (4 * side for side in case.sizes.finest)
    arrays: list[Any] = []
    for tensor, shape in zip(OPERATIONS[case.name].inputs, case.shapes, strict=True):
        if tensor.name == "anchors":
            sizes = random.uniform(2, 100, (*shape[:2], 2))
            parts = (random.random((*shape[:2], 2)) * (width, height), sizes, random.random((*shape[:2], 1)))
            array = np.concatenate(parts, axis=-1)
        elif tensor.name == "boxes":
            sides = np.exp(random.uniform(np.log(16), np.log(600), (*shape[:2], 2)))
            array = np.concatenate((random.random((*shape[:2], 2)) * (width, height), sides), axis=-1)
        elif tensor.name == "points":
            # As the decoder makes them: around a box of each query, on any level.
            centre = random.random((*shape[:2], 1, 1, 2)) * (width / 4, height / 4)
            extent = np.exp(random.uniform(np.log(4), np.log(100), (*shape[:2], 1, 1, 1)))
            place = centre + random.normal(size=(*shape[:4], 2)) * extent / 2
            array = np.concatenate((place, random.uniform(-1, 4, (*shape[:4], 1))), axis=-1)
        elif tensor.type == "bool":
            array = np.ones(shape, np.bool_)
        elif tensor.name == "sizes":
            array = np.broadcast_to(np.array([height, width]), shape)
        else:
            array = random.normal(size=shape)
        arrays.append(np.ascontiguousarray(array, np.bool_ if tensor.type == "bool" else np.float32))
    return arrays


def least_work(case: Case) -> tuple[float, float]:
    """Bytes that must move at least once, and arithmetic operations, of one launch."""
    operation, size = OPERATIONS[case.name], 4 if case.element == "float32" else 2
    sizes = {"element": size, "float32": 4, "bool": 1, "int32": 4, "int64": 8}
    outputs = operation.output_shapes(case.shapes, case.attributes)
    volume = {tensor.name: float(np.prod(shape)) for tensor, shape in zip(operation.inputs, case.shapes, strict=True)}
    written = sum(float(np.prod(shape)) * sizes[t.type] for t, shape in zip(operation.outputs, outputs, strict=True))
    read = sum(volume[tensor.name] * sizes[tensor.type] for tensor in operation.inputs if tensor.type != "element")
    if case.name == "AdaptiveProbing":
        return read + 2 * written, 0.0
    if case.name == "GatherAnchors":
        return read + written, 0.0
    if case.name == "PyramidRoIAlign":
        queries = float(np.prod(case.shapes[4][:2]))
        cells = 28.0 * 28.0  # what a box of its level covers at most
        touched = min(queries * cells * case.shapes[0][1], sum(volume[f"p{level}"] for level in (2, 3, 4, 5)))
        return read + touched * size + written, queries * case.shapes[0][1] * 49 * 40.0
    batch, queries, groups, points, _ = case.shapes[4]
    channels, mixed = case.shapes[0][1] // groups, case.attributes["mixed_points"]
    places = float(batch * queries * groups)
    touched = sum(min(places * points * channels * 4, volume[f"p{level}"]) for level in (2, 3, 4, 5))
    products = 2.0 * places * (points * channels * channels + mixed * points * channels)
    return read + (touched + volume["parameters"]) * size + written, products + places * points * channels * 32


def measure_limits() -> Limits:
    """Copy bandwidth, float32 rate and float16 matrix rate of the current GPU."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copy = _time(lambda: target.copy_(source))
    matrix = torch.randn((8192, 8192), device="cuda", dtype=torch.float16)
    product = _time(lambda: matrix @ matrix)
    clock = float(getattr(properties, "clock_rate", 0)) * 1e3 or 1.7e9
    return Limits(
        name=properties.name,
        bytes_per_second=2 * 4 * (1 << 28) / copy * 1e6,
        float_operations=2.0 * FLOAT_LANES * properties.multi_processor_count * clock,
        half_operations=2.0 * 8192**3 / product * 1e6,
    )


def measure(case: Case, limits: Limits, compare: bool) -> Row:
    """Time one case, and what it is compared with if `compare`."""
    import torch

    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    kinds |= {"bool": torch.bool, "int32": torch.int32, "int64": torch.int64}
    operation = OPERATIONS[case.name]
    plain = [torch.from_numpy(array).cuda() for array in random_inputs(case)]
    inputs = []
    for tensor, given in zip(operation.inputs, plain, strict=True):
        value = given.to(kinds[tensor.resolve(case.element)])
        if tensor.pyramid and case.channels_last:
            value = value.contiguous(memory_format=torch.channels_last)
        inputs.append(value)
    shapes = operation.output_shapes(case.shapes, case.attributes)
    outputs = [
        torch.empty(tuple(shape), dtype=kinds[tensor.resolve(case.element)], device="cuda")
        for tensor, shape in zip(operation.outputs, shapes, strict=True)
    ]
    arrays = [describe(value) for value in inputs], [describe(value) for value in outputs]

    def run() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        launch(case.name, *arrays, case.attributes, stream, case.tensor_cores)

    moved, operations = least_work(case)
    rate = limits.half_operations if case.tensor_cores else limits.float_operations
    return Row(
        case=case,
        batch=case.shapes[0][0],
        kernel=_time_in_graph(run),
        limit=max(moved / limits.bytes_per_second, operations / rate) * 1e6,
        definition=_time(_definition(case, plain)) if compare else None,
        torchvision=_time(_torchvision(plain)) if compare and case.name == "PyramidRoIAlign" else None,
        onnx_body=_time_onnx_body(case, plain) if compare else None,
    )


def describe(tensor: Any) -> DeviceArray:
    """A PyTorch tensor's memory, also of types that `__cuda_array_interface__` has no name for."""
    strides = tuple(step * tensor.element_size() for step in tensor.stride())
    return DeviceArray(tensor.data_ptr(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), strides)


def table(rows: Sequence[Row], limits: Limits) -> str:
    """The rows as Markdown, under machine and date."""
    heads = [
        *("op", "sizes", "batch", "kind", "kernel us", "of the limit"),
        *("PyTorch steps us", "faster by", "torchvision us", "ONNX body us"),
    ]
    lines = [
        f"{limits.name}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}: "
        f"copies {limits.bytes_per_second / 1e12:.2f} TB/s, "
        f"float32 {limits.float_operations / 1e12:.0f} TFLOP/s (from its clock), "
        f"float16 matrices {limits.half_operations / 1e12:.0f} TFLOP/s.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for row in rows:
        faster = f"{row.definition / row.kernel:.1f}x" if row.definition is not None else "-"
        cells = [row.case.name, row.case.sizes.name, str(row.batch), row.case.kind, f"{row.kernel:.1f}"]
        cells += [f"{row.limit / row.kernel:.0%}", _number(row.definition), faster]
        cells += [_number(row.torchvision), _number(row.onnx_body)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _definition(case: Case, inputs: list[Any]) -> Callable[[], Any]:
    """The float32 definition, as the PyTorch detector runs it."""
    from asag import ops

    function = {
        "AdaptiveProbing": ops.adaptive_probing_definition,
        "GatherAnchors": ops.gather_anchors_definition,
        "PyramidRoIAlign": ops.pyramid_roi_align_definition,
        "SamplingMixing": ops.sampling_mixing_definition,
    }[case.name]
    return lambda: function(*inputs, *case.attributes.values())  # type: ignore[operator]


def _torchvision(inputs: list[Any]) -> Callable[[], Any]:
    """torchvision's RoIAlign over several levels, for the same boxes."""
    import torch
    from torchvision.ops import MultiScaleRoIAlign

    maps, boxes = dict(zip("0123", inputs[:4], strict=True)), inputs[4]
    corners = torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2), dim=-1)
    align = MultiScaleRoIAlign(list(maps), output_size=7, sampling_ratio=2)
    shape = [(4 * inputs[0].shape[2], 4 * inputs[0].shape[3])] * boxes.shape[0]
    return lambda: align(maps, list(corners), shape)


def op_model(
    name: str, shapes: Sequence[Sequence[int]], attributes: Mapping[str, Any], element: str = "float32"
) -> bytes:
    """A serialized ONNX model of one op's node with its body; `element` ("float32" or "float16") is the maps' type."""
    from onnx import TensorProto, helper

    from export.functions import HELPER_FUNCTIONS, OP_FUNCTIONS
    from export.functions.domain import DOMAIN, DOMAIN_VERSION, OPSET_VERSION

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


def _time_onnx_body(case: Case, inputs: list[Any]) -> float | None:
    """The op's ONNX body on ONNX Runtime's CUDA provider, all on the GPU; None where that is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return None
    model = op_model(case.name, case.shapes, case.attributes)
    session = onnxruntime.InferenceSession(model, providers=["CUDAExecutionProvider"])
    binding = session.io_binding()
    for value, tensor in zip(session.get_inputs(), inputs, strict=True):
        kind = np.bool_ if value.type == "tensor(bool)" else np.float32
        binding.bind_input(value.name, "cuda", 0, kind, tuple(tensor.shape), tensor.data_ptr())
    for value in session.get_outputs():
        binding.bind_output(value.name, "cuda")
    for _ in range(3):
        session.run_with_iobinding(binding)
    start = time.perf_counter()
    for _ in range(REPEATS):
        session.run_with_iobinding(binding)  # waits for its stream
    return (time.perf_counter() - start) / REPEATS * 1e6


def _time(run: Callable[[], Any]) -> float:
    """Microseconds per call, started one after another from Python as a detector does it."""
    import torch

    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / REPEATS * 1e3


def _time_in_graph(run: Callable[[], None]) -> float:
    """Microseconds per launch inside a CUDA graph, the median of several replays."""
    import torch

    run()  # compiles and loads, which a graph cannot hold
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / LAUNCHES * 1e3)
    return float(np.median(times))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table. Raises ValueError where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m trt_plugins.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", choices=("published", "demo", "all"), default="all")
    parser.add_argument("--op", choices=tuple(OPERATIONS), help="only this op")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="images per launch")
    parser.add_argument("--no-compare", action="store_true", help="time the kernels only")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    try:
        import torch
    except ImportError as error:
        raise ValueError("the benchmark measures with PyTorch, which is not installed") from error
    if not torch.cuda.is_available():
        raise ValueError("the benchmark needs an NVIDIA GPU; there is none here")
    chosen: list[Sizes] = [sizes for sizes in (PUBLISHED, DEMO) if options.sizes in (sizes.name, "all")]
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        limits = measure_limits()
        rows = [
            measure(case, limits, not options.no_compare)
            for sizes in chosen
            for batch in options.batch
            for case in cases(sizes, batch)
            if options.op in (None, case.name)
        ]
    text = table(rows, limits)
    print(text)
    if options.output is not None:
        temporary = options.output.with_suffix(".partial")
        temporary.write_text(text)
        temporary.replace(options.output)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
