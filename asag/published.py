"""Published checkpoints: their tensor names and ours (specification section 8)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from asag.config import HEADS
from asag.detector import Detector

_ATTENTION = (
    (r"in_proj_weight", "in_projection.weight"),
    (r"in_proj_bias", "in_projection.bias"),
    (r"out_proj\.", "out_projection."),
)
_BRANCHES = (
    (r"(?:cls_fcs|cls_module)\.", "branches.class_branch."),
    (r"(?:fc_cls|class_logits)\.", "branches.class_logits."),
    (r"(?:reg_fcs|reg_module)\.", "branches.box_branch."),
    (r"(?:fc_reg|bboxes_delta)\.", "branches.box_deltas."),
)
_GENERATOR = (
    (r"compress\.0\.", "compress.P3."),
    (r"compress\.1\.", "compress.P4."),
    (r"compress\.2\.", "compress.P5."),
    (r"P6\.", "p6."),
    (r"layernorm\.0\.", "norm.P5."),
    (r"layernorm\.1\.", "norm.P4."),
    (r"layernorm\.2\.", "norm.P3."),
    (r"pos_embedding\.0\.weight", "position.P5"),
    (r"pos_embedding\.1\.weight", "position.P4"),
    (r"pos_embedding\.2\.weight", "position.P3"),
    (r"proj_all\.layers\.", "fixed_mlp."),
    (r"proj_patch\.layers\.", "probed_mlp."),
)
_PROPOSALS = (
    (r"iof_tau", "attention.tau"),
    (r"roi\.", "roi_projection."),
    (r"tokens_norm1\.", "roi_norm."),
    (r"tokens_proj\.layers\.", "feed_forward.mlp."),
    (r"tokens_norm2\.", "feed_forward.norm."),
    (r"tokens_norm3\.", "attention.norm."),
    *((rf"attn\.{theirs}", f"attention.attention.{ours}") for theirs, ours in _ATTENTION),
    *_BRANCHES,
)
_ADAMIXER = (
    (r"iof_tau", "attention.tau"),
    *((rf"attention\.{theirs}", f"attention.attention.{ours}") for theirs, ours in _ATTENTION),
    (r"attention_norm\.", "attention.norm."),
    (r"ffn\.layers\.", "feed_forward.mlp."),
    (r"ffn_norm\.", "feed_forward.norm."),
    (r"sampling_n_mixing\.sampling_offset_generator\.0\.", "sample_and_mix.offsets."),
    (r"sampling_n_mixing\.norm\.", "sample_and_mix.norm."),
    (r"sampling_n_mixing\.adaptive_mixing\.parameter_generator\.0\.", "sample_and_mix.parameters_of_query."),
    (r"sampling_n_mixing\.adaptive_mixing\.out_proj\.", "sample_and_mix.out_projection."),
    *_BRANCHES,
)
_SPARSE_RCNN = (
    *((rf"self_attn\.{theirs}", f"attention.{ours}") for theirs, ours in _ATTENTION),
    (r"norm1\.", "attention_norm."),
    (r"norm2\.", "convolution_norm."),
    (r"norm3\.", "feed_forward.norm."),
    (r"linear1\.", "feed_forward.mlp.0."),
    (r"linear2\.", "feed_forward.mlp.1."),
    (r"inst_interact\.dynamic_layer\.", "dynamic_convolution.parameters_of_query."),
    (r"inst_interact\.norm1\.", "dynamic_convolution.inner_norm."),
    (r"inst_interact\.norm2\.", "dynamic_convolution.outer_norm."),
    (r"inst_interact\.norm3\.", "dynamic_convolution.out_norm."),
    (r"inst_interact\.out_layer\.", "dynamic_convolution.out_projection."),
    *_BRANCHES,
)
_SECTIONS = (
    (r"backbone\.0\.body\.", "backbone.", ()),
    (r"neck\.", "neck.", ()),
    (r"anchor_generator\.", "anchor_generator.", _GENERATOR),
    (r"rpn\.", "proposals.", _PROPOSALS),
    (r"decoder\.decoder_embedding\.", "head_embedding.", ()),
    *((rf"decoder\.bbox_head\.{i}\.", f"heads.{head}.", _ADAMIXER) for i, head in enumerate(HEADS)),
    *((rf"decoder\.head_series\.{i}\.", f"heads.{head}.", _SPARSE_RCNN) for i, head in enumerate(HEADS)),
)


def translate_name(published: str) -> str | None:
    """Our name of a published tensor, or None when it is not part of the detector."""
    for section, ours, rules in _SECTIONS:
        match = re.match(section, published)
        if match is None:
            continue
        rest = published[match.end() :]
        if not rules:
            return ours + rest
        for pattern, replacement in rules:
            if re.match(pattern, rest):
                return ours + _even_layers(re.sub(f"^{pattern}", replacement, rest))
        return None
    return None


def _even_layers(name: str) -> str:
    """MLP layer i sits at place 2i of its sequence, between activations."""
    return re.sub(r"((?:^|[._])mlp)\.(\d)\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", name)


def load_published(detector: Detector, state: Mapping[str, Tensor | np.ndarray]) -> None:
    """Load a published ASAG state, {published name: tensor or array}, in place.

    Strict: raises ValueError naming the tensors that are missing, left over, or of another shape.
    """
    ours = detector.state_dict()
    translated: dict[str, Tensor] = {}
    left_over, misshapen = [], []
    for name, value in state.items():
        target = translate_name(name)
        if name.endswith("num_batches_tracked"):
            continue
        if target is None or target not in ours:
            left_over.append(name)
            continue
        tensor = torch.as_tensor(np.asarray(value) if isinstance(value, np.ndarray) else value)
        if tensor.shape != ours[target].shape:
            misshapen.append(f"{name} {list(tensor.shape)} (expected {list(ours[target].shape)})")
            continue
        translated[target] = tensor
    missing = [name for name in ours if name not in translated and not name.endswith("num_batches_tracked")]
    missing = [name for name in missing if not any(name == translate_name(m.split(" ")[0]) for m in misshapen)]
    problems = [
        f"{label}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})"
        for label, names in (("missing", missing), ("left over", left_over), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise ValueError("the state does not fit this detector; tensors " + "; ".join(problems))
    detector.load_state_dict(translated, strict=False)
