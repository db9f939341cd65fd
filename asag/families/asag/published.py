"""Published checkpoints: their tensor names and ours, and which configuration has which tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from asag.families.asag.config import ANCHOR_BUDGETS, BACKBONES, HEADS, ASAGConfig
from asag.foreign_files import renamed
from asag.parts.backbones.resnet import BLOCKS_PER_STAGE

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
        name = renamed(rest, rules)
        return None if name is None else ours + _even_layers(name)
    return None


def _even_layers(name: str) -> str:
    """MLP layer i sits at place 2i of its sequence, between activations."""
    return re.sub(r"((?:^|[._])mlp)\.(\d)\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", name)


class PublishedASAG:
    """Files with the authors' names."""

    looked_for = "anchor_generator.proj_all.layers.2.weight"

    def identify(self, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> ASAGConfig | None:
        """Decoder, backbone, queries and dataset, read off the tensors."""
        if self.looked_for not in state:
            return None
        decoder = "adamixer" if "decoder.bbox_head.0.iof_tau" in state else "sparse_rcnn"
        class_layer = "bbox_head.0.fc_cls" if decoder == "adamixer" else "head_series.0.class_logits"
        weight = state.get(f"decoder.{class_layer}.weight")
        if weight is None:
            raise ValueError(f"an ASAG checkpoint without decoder.{class_layer}.weight; is the file whole?")
        classes, first = weight.shape[0], state[self.looked_for].shape[0] // 5
        layer = "backbone.0.body.layer3."
        blocks = sum(name.startswith(layer) and name.endswith(".conv1.weight") for name in state)
        bottleneck = "backbone.0.body.layer1.0.conv3.weight" in state
        dataset = "crowdhuman" if classes == 1 else "coco"
        backbones = [name for name in BACKBONES if BLOCKS_PER_STAGE[name][2] == blocks and bottleneck]
        queries = [q for (d, q), budget in ANCHOR_BUDGETS.items() if d == dataset and budget.fixed_anchors == first]
        if not backbones or not queries:
            raise ValueError(f"no published ASAG has {blocks} blocks in layer3 and {first} anchors per P5 patch")
        return ASAGConfig(decoder, backbones[0], queries[0], dataset=dataset, num_classes=classes)

    def translate(self, name: str, value: Tensor, config: ASAGConfig) -> Iterator[tuple[str, Tensor]] | None:
        """The tensor under our name."""
        ours = translate_name(name)
        return None if ours is None else iter([(ours, value)])
