"""Published checkpoints: their tensor names and ours, and which configuration has which tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from asag.families.adamixer.config import AdaMixerConfig
from asag.foreign_files import renamed
from asag.parts.backbones.resnet import BLOCKS_PER_STAGE

_START = (
    (r"backbone\.", "backbone."),
    (r"neck\.lateral_convs\.(\d)\.conv\.", r"neck.lateral.\1."),
    (r"neck\.gn_out\.", "neck.norm."),
    (r"rpn_head\.init_proposal_bboxes\.weight$", "initial_boxes"),
    (r"rpn_head\.init_content_features\.weight$", "initial_queries"),
)
_STAGE = (
    (r"iof_tau$", "attention.tau"),
    (r"attention\.attn\.in_proj_", "attention.attention.in_projection."),
    (r"attention\.attn\.out_proj\.", "attention.attention.out_projection."),
    (r"attention_norm\.", "attention.norm."),
    (r"sampling_n_mixing\.sampling_offset_generator\.0\.", "sample_and_mix.offsets."),
    (r"sampling_n_mixing\.adaptive_mixing\.parameter_generator\.0\.", "sample_and_mix.parameters_of_query."),
    (r"sampling_n_mixing\.adaptive_mixing\.out_proj\.", "sample_and_mix.out_projection."),
    (r"sampling_n_mixing\.norm\.", "sample_and_mix.norm."),
    (r"ffn\.layers\.0\.0\.", "feed_forward.mlp.0."),
    (r"ffn\.layers\.1\.", "feed_forward.mlp.2."),
    (r"ffn_norm\.", "feed_forward.norm."),
    (r"cls_fcs\.", "branches.class_branch."),
    (r"fc_cls\.", "branches.class_logits."),
    (r"reg_fcs\.", "branches.box_branch."),
    (r"fc_reg\.", "branches.box_deltas."),
)
_NAMES = (*_START, *((rf"roi_head\.bbox_head\.(\d+)\.{theirs}", rf"decoder.\1.{ours}") for theirs, ours in _STAGE))


def translate_name(published: str) -> str | None:
    """Our name of a published tensor, or None when it is not part of the detector."""
    return renamed(published, _NAMES)


class PublishedAdaMixer:
    """Files with the authors' names, of plain detectors and of those trained with recollection."""

    looked_for = "rpn_head.init_content_features.weight and roi_head.bbox_head.0.iof_tau"

    def identify(self, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> AdaMixerConfig | None:
        """Backbone, queries, stages and classes, read off the tensors."""
        if any(name not in state for name in self.looked_for.split(" and ")):
            return None
        logits = state.get("roi_head.bbox_head.0.fc_cls.weight")
        if logits is None:
            raise ValueError("an AdaMixer checkpoint without roi_head.bbox_head.0.fc_cls.weight; is the file whole?")
        blocks = sum(re.fullmatch(r"backbone\.layer3\.\d+\.conv1\.weight", name) is not None for name in state)
        bottleneck = "backbone.layer1.0.conv3.weight" in state
        backbones = [name for name in ("resnet50", "resnet101") if BLOCKS_PER_STAGE[name][2] == blocks and bottleneck]
        if not backbones:
            raise ValueError(f"no published AdaMixer has {blocks} blocks in layer3 of its backbone")
        return AdaMixerConfig(
            backbone=backbones[0],
            queries=len(state["rpn_head.init_content_features.weight"]),
            stages=sum(re.fullmatch(r"roi_head\.bbox_head\.\d+\.iof_tau", name) is not None for name in state),
            num_classes=len(logits),
        )

    def translate(self, name: str, value: Tensor, config: AdaMixerConfig) -> Iterator[tuple[str, Tensor]] | None:
        """The tensor under our name."""
        ours = translate_name(name)
        return None if ours is None else iter([(ours, value)])
