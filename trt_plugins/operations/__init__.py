"""The custom ops, each described once; everything that handles ops goes through :data:`OPERATIONS`.

A new op is its definition in `asag.ops`, its body in `export.op_bodies`, its kernel in `trt_plugins/kernels`, and a
module here with its :class:`Operation`, which is listed below.
"""

from asag.trt_plugins.operations.adaptive_probing import ADAPTIVE_PROBING
from asag.trt_plugins.operations.deformable_attention import DEFORMABLE_ATTENTION
from asag.trt_plugins.operations.description import DOMAIN, ELEMENT_TYPES, STATIC_SHARED_LIMIT, Operation, Tensor, Work
from asag.trt_plugins.operations.gather_anchors import GATHER_ANCHORS
from asag.trt_plugins.operations.pyramid_roi_align import PYRAMID_ROI_ALIGN
from asag.trt_plugins.operations.sample_grid import SAMPLE_GRID
from asag.trt_plugins.operations.sampling_mixing import SAMPLING_MIXING
from asag.trt_plugins.operations.select_tokens import SELECT_TOKENS

__all__ = ["DOMAIN", "ELEMENT_TYPES", "OPERATIONS", "STATIC_SHARED_LIMIT", "Operation", "Tensor", "Work"]

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        ADAPTIVE_PROBING,
        GATHER_ANCHORS,
        PYRAMID_ROI_ALIGN,
        SAMPLING_MIXING,
        DEFORMABLE_ATTENTION,
        SELECT_TOKENS,
        SAMPLE_GRID,
    )
}
"""By the names of their ONNX nodes."""
