"""The operations of the detectors that no standard operator expresses well.

Each op has one plain-PyTorch *definition* here. `torch.ops.asag.<name>` is the same op for inference: a node that the
exporter sees as one operation and that a CUDA kernel serves on a GPU (`asag.ops.cuda`). The functions exported from
this package choose: where gradients are needed they call the definition (differentiable), otherwise the op.
"""

from asag.ops.adaptive_probing import adaptive_probing, adaptive_probing_definition, crop_patches, probe_candidates
from asag.ops.cuda import definitions_only, register_cuda_kernels
from asag.ops.deformable_attention import deformable_attention_definition, multi_scale_deformable_attention
from asag.ops.gather_anchors import gather_anchors, gather_anchors_definition
from asag.ops.pyramid_roi_align import pyramid_roi_align, pyramid_roi_align_definition
from asag.ops.sample_grid import sample_grid, sample_grid_definition
from asag.ops.sampling_mixing import sampling_mixing, sampling_mixing_definition
from asag.ops.select_tokens import select_tokens, select_tokens_definition

__all__ = [
    "adaptive_probing",
    "adaptive_probing_definition",
    "crop_patches",
    "definitions_only",
    "deformable_attention_definition",
    "gather_anchors",
    "gather_anchors_definition",
    "multi_scale_deformable_attention",
    "probe_candidates",
    "pyramid_roi_align",
    "pyramid_roi_align_definition",
    "sample_grid",
    "sample_grid_definition",
    "sampling_mixing",
    "sampling_mixing_definition",
    "select_tokens",
    "select_tokens_definition",
]

register_cuda_kernels()
