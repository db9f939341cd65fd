"""Published checkpoints: their tensor names and ours, and which configuration has which tensors.

Three kinds of names: of the authors of Deformable and Sparse DETR, of MMDetection, and of Hugging Face's
`DeformableDetrForObjectDetection`. A name is translated to the authors' first, and from there to ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from asag.datasets import COCO_CATEGORIES
from asag.families.deformable.config import DeformableConfig, ModelSize
from asag.parts.backbones.resnet import BLOCKS_PER_STAGE

ROWS_OF_COCO = 91
"""Class logits of a detector whose classes are COCO's category ids, those that no category has among them."""

_ATTENTION = (
    (r"sampling_offsets\.", "offsets."),
    (r"attention_weights\.", "weights."),
    (r"value_proj\.", "value_projection."),
    (r"output_proj\.", "output_projection."),
)
_LAYERS = (
    *((rf"transformer\.encoder\.layers\.(\d+)\.self_attn\.{a}", rf"encoder.layers.\1.attention.{b}") for a, b in _ATTENTION),
    (r"transformer\.encoder\.layers\.(\d+)\.norm1\.", r"encoder.layers.\1.attention_norm."),
    (r"transformer\.encoder\.layers\.(\d+)\.norm2\.", r"encoder.layers.\1.feed_forward.norm."),
    (r"transformer\.encoder\.layers\.(\d+)\.linear1\.", r"encoder.layers.\1.feed_forward.mlp.0."),
    (r"transformer\.encoder\.layers\.(\d+)\.linear2\.", r"encoder.layers.\1.feed_forward.mlp.2."),
    *((rf"transformer\.decoder\.layers\.(\d+)\.cross_attn\.{a}", rf"decoder.\1.cross_attention.{b}") for a, b in _ATTENTION),
    (r"transformer\.decoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"decoder.\1.self_attention.output_projection."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm1\.", r"decoder.\1.cross_attention_norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm2\.", r"decoder.\1.self_attention_norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm3\.", r"decoder.\1.feed_forward.norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.linear1\.", r"decoder.\1.feed_forward.mlp.0."),
    (r"transformer\.decoder\.layers\.(\d+)\.linear2\.", r"decoder.\1.feed_forward.mlp.2."),
)
_NAMES = (
    (r"backbone\.0\.body\.", "backbone."),
    (r"input_proj\.(\d)\.(\d)\.", r"neck.levels.\1.\2."),
    (r"transformer\.level_embed$", "level_embedding"),
    (r"query_embed\.weight$", "query_embedding"),
    (r"transformer\.reference_points\.", "reference_points."),
    (r"transformer\.enc_output\.", "candidates.projection."),
    (r"transformer\.enc_output_norm\.", "candidates.norm."),
    (r"transformer\.pos_trans\.", "box_embedding.projection."),
    (r"transformer\.pos_trans_norm\.", "box_embedding.norm."),
    (r"transformer\.enc_mask_predictor\.layer1\.0\.", "token_scorer.norm."),
    (r"transformer\.enc_mask_predictor\.layer1\.1\.", "token_scorer.mix."),
    (r"transformer\.enc_mask_predictor\.layer2\.", "token_scorer.score."),
    *_LAYERS,
)
_HEADS = re.compile(r"(class|bbox)_embed\.(\d+)\.(?:layers\.(\d)\.)?(weight|bias)$")
_STACKED = re.compile(r"transformer\.decoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)$")
_NOT_NEEDED = re.compile(
    # Heads once more, under the transformer; what follows from the window's size; counts of profilers.
    r"transformer\.(encoder|decoder)\.(class|bbox)_embed\.|.*relative_position_index$|.*total_(params|ops)$"
)


def translate_name(name: str, config: DeformableConfig) -> str | None:
    """Our name of a tensor of the authors, or None where it has none: not part of the detector, not needed, stacked."""
    if (head := _HEADS.match(name)) is not None:
        return _head_name(*head.groups(), config)
    for pattern, replacement in _NAMES:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", replacement, name)
    return None


def _head_name(kind: str, number: str, layer: str | None, leaf: str, config: DeformableConfig) -> str | None:
    """Heads of the decoder's layers come first, then that of the encoder's tokens, then those of its layers."""
    decoder, index = config.size.decoder_layers, int(number)
    part = "class_logits" if kind == "class" else f"box_deltas.{2 * int(layer or 0)}"
    if not config.head_per_layer:
        return f"heads.0.{part}.{leaf}"
    if index < decoder:
        return f"heads.{index}.{part}.{leaf}"
    if index == decoder:
        return f"proposal_head.{part}.{leaf}"
    return f"encoder_heads.{index - decoder - 1}.{part}.{leaf}"


class PublishedDeformable:
    """Files of Deformable, Efficient and Sparse DETR."""

    looked_for = "transformer.level_embed and class_embed.0.weight"

    def identify(self, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> DeformableConfig | None:
        """The switches, read off the tensors."""
        raise NotImplementedError

    def translate(self, name: str, value: Tensor, config: DeformableConfig) -> Iterator[tuple[str, Tensor]] | None:
        """The tensor under our name, without the rows of ids that no category of COCO has."""
        if _NOT_NEEDED.match(name):
            return iter(())
        if (stacked := _STACKED.match(name)) is not None:
            layer, leaf = stacked.groups()
            query_key, own = value.split([2 * len(value) // 3, len(value) // 3])
            prefix = f"decoder.{layer}.self_attention"
            return iter([(f"{prefix}.query_key.{leaf}", query_key), (f"{prefix}.value.{leaf}", own)])
        ours = translate_name(name, config)
        if ours is None:
            return None
        if "class_logits" in ours and config.classes == len(COCO_CATEGORIES) and len(value) == ROWS_OF_COCO:
            value = value[list(COCO_CATEGORIES)]
        return iter([(ours, value)])
