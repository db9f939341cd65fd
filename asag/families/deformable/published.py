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
from asag.families.deformable.config import BACKBONES, LEVELS, DeformableConfig, ModelSize
from asag.foreign_files import renamed
from asag.parts.backbones.resnet import resnet_of
from asag.parts.backbones.swin import DEPTHS

ROWS_OF_COCO = 91
"""Class logits of a detector whose classes are COCO's category ids, those that no category has among them."""

_ENCODER_LAYER = (
    (r"norm1\.", "attention_norm."),
    (r"norm2\.", "feed_forward.norm."),
    (r"self_attn\.", "attention."),
)
_DECODER_LAYER = (
    (r"self_attn\.out_proj\.", "self_attention.output_projection."),
    (r"self_attn\.q_proj\.", "self_attention.query."),
    (r"self_attn\.k_proj\.", "self_attention.key."),
    (r"self_attn\.v_proj\.", "self_attention.value."),
    (r"norm1\.", "cross_attention_norm."),
    (r"norm2\.", "self_attention_norm."),
    (r"norm3\.", "feed_forward.norm."),
    (r"cross_attn\.", "cross_attention."),
)
_EITHER_LAYER = ((r"linear1\.", "feed_forward.mlp.0."), (r"linear2\.", "feed_forward.mlp.2."))
_ATTENTION = (
    ("attention.sampling_offsets.", "attention.offsets."),
    ("attention.attention_weights.", "attention.weights."),
    ("attention.value_proj.", "attention.value_projection."),
    ("attention.output_proj.", "attention.output_projection."),
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
    *(
        (rf"transformer\.encoder\.layers\.(\d+)\.{theirs}", rf"encoder.layers.\1.{ours}")
        for theirs, ours in (*_ENCODER_LAYER, *_EITHER_LAYER)
    ),
    *(
        (rf"transformer\.decoder\.layers\.(\d+)\.{theirs}", rf"decoder.\1.{ours}")
        for theirs, ours in (*_DECODER_LAYER, *_EITHER_LAYER)
    ),
)
_HEADS = re.compile(r"(?P<kind>class|bbox)_embed\.(?P<number>\d+)\.(?:layers\.(?P<layer>\d)\.)?(?P<leaf>weight|bias)")
_STACKED = re.compile(r"transformer\.decoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)$")
_NOT_NEEDED = re.compile(
    # Heads once more, under the transformer; what follows from the window's size; counts of profilers.
    r"transformer\.(encoder|decoder)\.(class|bbox)_embed\.|.*relative_position_index$|.*total_(params|ops)$"
)


def translate_name(name: str, config: DeformableConfig) -> str | None:
    """Our name of a tensor of the authors, or None where it has none: not part of the detector, not needed, stacked."""
    if (head := _HEADS.fullmatch(name)) is not None:
        return _head_name(head["kind"], int(head["number"]), int(head["layer"] or 0), head["leaf"], config)
    ours = renamed(name, _NAMES)
    if ours is not None:
        for theirs, own in _ATTENTION:
            ours = ours.replace(theirs, own)
    return ours


def _head_name(kind: str, number: int, layer: int, leaf: str, config: DeformableConfig) -> str:
    """Heads of the decoder's layers come first, then that of the encoder's tokens, then those of its layers."""
    part = f"class_logits.{leaf}" if kind == "class" else f"box_deltas.{2 * layer}.{leaf}"
    after = number - config.size.decoder_layers
    if not config.head_per_layer:
        return f"heads.0.{part}"
    if after < 0:
        return f"heads.{number}.{part}"
    return f"proposal_head.{part}" if after == 0 else f"encoder_heads.{after - 1}.{part}"


_LAYERS_OF = r"(?:bbox_head\.transformer\.)?"
"""Where MMDetection's layers stand: in its second version there, in its third on their own."""

_OTHERS = (
    # MMDetection's, of its second and third version; the decoder's norms stand in the order of computation.
    (r"backbone\.(?!0\.body\.|conv_encoder\.)", "backbone.0.body."),
    (r"neck\.convs\.(\d)\.conv\.", r"input_proj.\1.0."),
    (r"neck\.convs\.(\d)\.gn\.", r"input_proj.\1.1."),
    (r"neck\.extra_convs\.0\.conv\.", "input_proj.3.0."),
    (r"neck\.extra_convs\.0\.gn\.", "input_proj.3.1."),
    (r"(?:bbox_head\.)?query_embedding\.", "query_embed."),
    (r"(?:bbox_head\.transformer\.)?level_embeds?$", "transformer.level_embed"),
    (r"bbox_head\.cls_branches\.", "class_embed."),
    (r"bbox_head\.reg_branches\.(\d+)\.0\.", r"bbox_embed.\1.layers.0."),
    (r"bbox_head\.reg_branches\.(\d+)\.2\.", r"bbox_embed.\1.layers.1."),
    (r"bbox_head\.reg_branches\.(\d+)\.4\.", r"bbox_embed.\1.layers.2."),
    (rf"{_LAYERS_OF}(encoder\.layers\.\d+\.)(?:attentions\.0|self_attn)\.", r"transformer.\1self_attn."),
    (rf"{_LAYERS_OF}(encoder\.layers\.\d+\.)norms\.0\.", r"transformer.\1norm1."),
    (rf"{_LAYERS_OF}(encoder\.layers\.\d+\.)norms\.1\.", r"transformer.\1norm2."),
    (rf"{_LAYERS_OF}(decoder\.layers\.\d+\.)(?:attentions\.0|self_attn)\.attn\.", r"transformer.\1self_attn."),
    (rf"{_LAYERS_OF}(decoder\.layers\.\d+\.)(?:attentions\.1|cross_attn)\.", r"transformer.\1cross_attn."),
    (rf"{_LAYERS_OF}(decoder\.layers\.\d+\.)norms\.0\.", r"transformer.\1norm2."),
    (rf"{_LAYERS_OF}(decoder\.layers\.\d+\.)norms\.1\.", r"transformer.\1norm1."),
    (rf"{_LAYERS_OF}(decoder\.layers\.\d+\.)norms\.2\.", r"transformer.\1norm3."),
    (rf"{_LAYERS_OF}(\w+\.layers\.\d+\.)ffns?(?:\.0)?\.layers\.0\.0\.", r"transformer.\1linear1."),
    (rf"{_LAYERS_OF}(\w+\.layers\.\d+\.)ffns?(?:\.0)?\.layers\.1\.", r"transformer.\1linear2."),
    (r"bbox_head\.(transformer\.(?:reference_points|enc_output|enc_output_norm|pos_trans|pos_trans_norm)\.)", r"\1"),
    (r"(reference_points|pos_trans)_fc\.", r"transformer.\1."),
    (r"(pos_trans_norm\.)", r"transformer.\1"),
    (r"memory_trans_fc\.", "transformer.enc_output."),
    (r"memory_trans_norm\.", "transformer.enc_output_norm."),
    # Hugging Face's.
    (r"model\.backbone\.conv_encoder\.model\.", "backbone.0.body."),
    (r"model\.(input_proj\.)", r"\1"),
    (r"model\.query_position_embeddings\.", "query_embed."),
    # Heads stand here, in the detector, or in both; transformers 5 leaves out what is there twice.
    (r"model\.decoder\.(class|bbox)_embed\.", r"\1_embed."),
    (r"model\.(encoder\.layers\.\d+\.)self_attn_layer_norm\.", r"transformer.\1norm1."),
    (r"model\.(encoder\.layers\.\d+\.)final_layer_norm\.", r"transformer.\1norm2."),
    (r"model\.(decoder\.layers\.\d+\.)self_attn_layer_norm\.", r"transformer.\1norm2."),
    (r"model\.(decoder\.layers\.\d+\.)encoder_attn_layer_norm\.", r"transformer.\1norm1."),
    (r"model\.(decoder\.layers\.\d+\.)final_layer_norm\.", r"transformer.\1norm3."),
    (r"model\.(decoder\.layers\.\d+\.)encoder_attn\.", r"transformer.\1cross_attn."),
    (r"model\.(\w+\.layers\.\d+\.)fc([12])\.", r"transformer.\1linear\2."),
    (r"model\.", "transformer."),
)


def authors_name(name: str) -> str:
    """The name that the authors would have given a tensor of another file; their own names stay."""
    return renamed(name, _OTHERS) or name


class PublishedDeformable:
    """Files of Deformable, Efficient and Sparse DETR."""

    looked_for = "transformer.level_embed (level_embeds, level_embed), class_embed.0 or cls_branches.0"

    def identify(self, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> DeformableConfig | None:
        """The switches, read off the tensors; what no tensor shows, off the arguments or the configuration beside them.

        Without these a detector of two stages has 300 queries, and a sparse one keeps a tenth of its tokens.
        """
        named = {authors_name(name): value for name, value in state.items()}
        classes = {name: value for name, value in named.items() if re.fullmatch(r"class_embed\.\d+\.weight", name)}
        if "transformer.level_embed" not in named or not classes:
            return None
        _refuse_unknown(description)
        of_mmdetection = not state.keys().isdisjoint(("bbox_head.transformer.level_embeds", "level_embed"))
        return _config(named, list(classes.values()), of_mmdetection, description)

    def translate(self, name: str, value: Tensor, config: DeformableConfig) -> Iterator[tuple[str, Tensor]] | None:
        """The tensor under our name, without the rows of ids that no category of COCO has."""
        name = authors_name(name)
        if _NOT_NEEDED.match(name):
            return iter(())
        if (stacked := _STACKED.match(name)) is not None:
            layer, leaf = stacked.groups()
            names = (f"decoder.{layer}.self_attention.{part}.{leaf}" for part in ("query", "key", "value"))
            return zip(names, value.chunk(3), strict=True)
        ours = translate_name(name, config)
        if ours is None:
            return None
        if "class_logits" in ours and config.classes == len(COCO_CATEGORIES) and len(value) == ROWS_OF_COCO:
            value = value[_kept_rows(ours, config)]
        if not ours.startswith("heads.0.class_logits."):
            return iter([(ours, value)])
        # transformers 5 has one for all layers, also where each has its own boxes; where there are more, they follow.
        heads = config.size.decoder_layers if config.head_per_layer else 1
        return iter([(ours.replace("heads.0.", f"heads.{layer}."), value) for layer in range(heads)])


def _kept_rows(name: str, config: DeformableConfig) -> list[int]:
    """The rows of a class layer that COCO's categories have."""
    kept = list(COCO_CATEGORIES)
    # Where the first logit says "object or not", it is the first of all rows that says so, not the first category's.
    return kept if config.rank_by_class or not name.startswith("proposal_head") else [0, *kept[1:]]


_ONLY = {
    "dilation": False,
    "activation_function": "relu",
    "position_embedding_type": "sine",
    "position_embedding": "sine",
}
"""What a file may tell that no tensor shows, with the one value that is known here."""


def _refuse_unknown(description: Mapping[str, Any]) -> None:
    for name, value in _ONLY.items():
        if (told := description.get(name, value)) != value:
            raise ValueError(f"a Deformable DETR with {name}={told} is not known here; only {name}={value} is")
    encoder, decoder = (description.get(f"{part}_attention_heads") for part in ("encoder", "decoder"))
    if encoder != decoder:
        raise ValueError(
            f"a Deformable DETR of {encoder} heads in the encoder, {decoder} in the decoder is not known here"
        )


def _config(
    named: Mapping[str, Tensor], classes: list[Tensor], of_mmdetection: bool, description: Mapping[str, Any]
) -> DeformableConfig:
    """Of tensors by the authors' names. Raises ValueError for a variant that is not known."""
    levels, channels = named["transformer.level_embed"].shape
    if levels != LEVELS:
        raise ValueError(f"a Deformable DETR of {levels} levels is not known here; those of {LEVELS} are")
    two_stage, sparse = (
        "transformer.enc_output.weight" in named,
        "transformer.enc_mask_predictor.layer1.1.weight" in named,
    )
    boxes = [value for name, value in named.items() if re.fullmatch(r"bbox_embed\.\d+\.layers\.2\.weight", name)]
    own_heads = any(not torch.equal(kind[0], other) for kind in (classes, boxes) for other in kind[1:])
    if two_stage and not own_heads:
        raise ValueError("a Deformable DETR of two stages with one head for all layers was never published")
    content = two_stage and len(named["transformer.pos_trans.weight"]) == channels
    backbone, width = _backbone(named)
    size = _size(named, channels, width, int(description.get("encoder_attention_heads", description.get("nheads", 8))))
    if len(classes) not in (1, size.decoder_layers) and len(classes) <= size.decoder_layers:
        raise ValueError(f"{len(classes)} class layers for {size.decoder_layers} decoder layers; is the file whole?")
    # Hugging Face's configuration has another name for those of two stages.
    told = description.get("two_stage_num_proposals", description.get("num_queries", 300))
    queries = int(told) if two_stage else len(named["query_embed.weight"])
    rows = len(classes[0])
    return DeformableConfig(
        backbone=backbone,
        queries=queries,
        num_classes=len(COCO_CATEGORIES) if rows == ROWS_OF_COCO else rows,
        head_per_layer=own_heads,
        refine_boxes=own_heads,
        two_stage=two_stage,
        content_from_memory=content,
        rank_by_class=content,
        keeping_ratio=float(description.get("rho") or 0.1) if sparse else None,
        encoder_heads=len(classes) > size.decoder_layers + 1,
        projection_bias="input_proj.0.0.bias" in named,
        clip_boxes=of_mmdetection,
        size=size,
    )


def _backbone(named: Mapping[str, Tensor]) -> tuple[str, int]:
    """Name, and channels of the first layer."""
    if "backbone.0.body.patch_embed.proj.weight" in named:
        blocks = sum(name.endswith("attn.qkv.weight") for name in named if name.startswith("backbone.0.body."))
        found = next((name for name, depths in DEPTHS.items() if sum(depths) == blocks), None)
        first = "patch_embed.proj.weight"
    else:
        found, first = resnet_of(named, "backbone.0.body."), "conv1.weight"
    if found is None or f"backbone.0.body.{first}" not in named:
        raise ValueError(
            f"the backbone is none that is known here; known are {', '.join(BACKBONES)}, ResNets by their names in "
            "torchvision and timm"
        )
    return found, named[f"backbone.0.body.{first}"].shape[0]


def _size(named: Mapping[str, Tensor], channels: int, width: int, heads: int) -> ModelSize:
    def layers(part: str) -> int:
        return sum(
            re.fullmatch(rf"transformer\.{part}\.layers\.\d+\.linear1\.weight", name) is not None for name in named
        )

    return ModelSize(
        backbone_width=width,
        channels=channels,
        attention_heads=heads,
        points=len(named["transformer.encoder.layers.0.self_attn.attention_weights.bias"]) // (heads * LEVELS),
        feed_forward=len(named["transformer.encoder.layers.0.linear1.bias"]),
        encoder_layers=layers("encoder"),
        decoder_layers=layers("decoder"),
    )
