"""The custom ops on a CUDA device: the kernels of `trt_plugins`, for inference.

Not registered by default: the kernels have passed their emulation on a CPU and compile for every architecture, but have
not run on a GPU yet. Call :func:`register_cuda_kernels` to use them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asag.ops.adaptive_probing import _adaptive_probing, adaptive_probing_definition
from asag.ops.gather_anchors import _gather_anchors, gather_anchors_definition
from asag.ops.pyramid_roi_align import _pyramid_roi_align, pyramid_roi_align_definition
from asag.ops.sampling_mixing import _sampling_mixing, sampling_mixing_definition


def register_cuda_kernels() -> None:
    """Let `torch.ops.asag.*` run as kernels on CUDA tensors. Types that have no kernel keep the definition."""
    for op, name, definition in (
        (_adaptive_probing, "AdaptiveProbing", adaptive_probing_definition),
        (_gather_anchors, "GatherAnchors", gather_anchors_definition),
        (_pyramid_roi_align, "PyramidRoIAlign", pyramid_roi_align_definition),
        (_sampling_mixing, "SamplingMixing", sampling_mixing_definition),
    ):
        op.register_kernel("cuda")(_implementation(name, definition))


def _implementation(name: str, definition: Any) -> Any:
    def run(*arguments: Any, **named: Any) -> Any:
        from trt_plugins.launch import launch
        from trt_plugins.plan import OPERATIONS, make_plan

        operation = OPERATIONS[name]
        count = len(operation.inputs)
        tensors = list(arguments[:count])
        attributes = dict(zip((key for key, _ in operation.attributes), arguments[count:], strict=False)) | named
        element = next(
            (_type(t) for given, t in zip(operation.inputs, tensors, strict=True) if given.type == "element"), "float32"
        )
        shapes = [tuple(tensor.shape) for tensor in tensors]
        try:
            make_plan(name, shapes, attributes, element)
        except ValueError:
            return definition(*arguments, **named)
        maps_last = operation.has_pyramid and all(
            tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors[:4]
        )
        for index, given in enumerate(operation.inputs):
            if not (given.pyramid and maps_last):
                tensors[index] = tensors[index].to(getattr(torch, given.resolve(element))).contiguous()
        device = tensors[0].device
        outputs = [
            torch.empty(tuple(shape), dtype=getattr(torch, given.resolve(element)), device=device)
            for given, shape in zip(operation.outputs, operation.output_shapes(shapes, attributes), strict=True)
        ]
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            launch(name, [_describe(t) for t in tensors], [_describe(t) for t in outputs], attributes, stream)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return run


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _describe(tensor: Tensor) -> Any:
    from trt_plugins.launch import DeviceArray

    strides = tuple(step * tensor.element_size() for step in tensor.stride())
    return DeviceArray(tensor.data_ptr(), tuple(tensor.shape), _type(tensor), strides)
