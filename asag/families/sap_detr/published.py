"""Published checkpoints: their tensor names and ours, and which configuration has which tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from asag.datasets import COCO_CATEGORIES
from asag.families.sap_detr.config import ModelSize, SAPDETRConfig
from asag.families.sap_detr.geometry import grid_points
from asag.foreign_files import renamed
from asag.parts.backbones.resnet import resnet_of

ROWS_OF_COCO = 91
"""Class logits of a detector whose classes are COCO's category ids, those that no category has among them."""

_FEED_FORWARD = ((r"linear1\.", "feed_forward.mlp.0."), (r"linear2\.", "feed_forward.mlp.2."))
_ENCODER_LAYER = (
    (r"self_attn\.out_proj\.", "attention.output_projection."),
    (r"norm1\.", "attention_norm."),
    (r"norm2\.", "feed_forward.norm."),
    *_FEED_FORWARD,
)
_DECODER_LAYER = (
    (r"sa_qcontent_proj\.", "self_attention.query.content."),
    (r"sa_point_qpos_proj\.", "self_attention.query.point."),
    (r"sa_bbox_qpos_proj\.", "self_attention.query.box."),
    (r"sa_kcontent_proj\.", "self_attention.key.content."),
    (r"sa_point_kpos_proj\.", "self_attention.key.point."),
    (r"sa_bbox_kpos_proj\.", "self_attention.key.box."),
    (r"sa_v_proj\.", "self_attention.value."),
    (r"self_attn\.out_proj\.", "self_attention.output_projection."),
    (r"norm1\.", "self_attention_norm."),
    (r"gaussian_proj\.layers\.0\.", "gaussian.projection.0."),
    (r"gaussian_proj\.layers\.1\.", "gaussian.projection.2."),
    (r"gaussian_proj\.layers\.2\.", "gaussian.projection.4."),
    (r"ca_point_qpos_proj\.", "cross_attention.query.point."),
    (r"ca_bbox_qpos_proj\.", "cross_attention.query.box."),
    (r"ca_kcontent_proj\.", "cross_attention.key."),
    (r"ca_kpos_proj\.", "cross_attention.key_position."),
    (r"ca_v_proj\.", "cross_attention.value."),
    (r"ca_qpos_sine_proj\.", "cross_attention.query_point."),
    (r"ca_bbox_qpos_sine_proj\.", "cross_attention.query_box."),
    (r"cross_attn\.out_proj\.", "cross_attention.output_projection."),
    (r"norm2\.", "cross_attention_norm."),
    (r"norm3\.", "feed_forward.norm."),
    *_FEED_FORWARD,
)
_NAMES = (
    (r"backbone\.0\.body\.", "backbone."),
    (r"input_proj\.", "neck."),
    (r"refbbox_embed\.weight$", "distances"),
    (r"obj_embed\.", "objectness."),
    (r"transformer\.decoder\.norm\.", "decoder_norm."),
    *(
        (rf"{theirs}\.layers\.{layer}\.", f"{ours}.{2 * layer}.")
        for theirs, ours in (
            (r"transformer\.decoder\.query_scale", "placement.scale"),
            ("ref_point_head", "placement.point"),
            ("ref_bbox_head", "placement.box"),
        )
        for layer in (0, 1)
    ),
    *(
        (rf"{theirs}\.(\d+)\.layers\.{layer}\.", rf"{ours}.{2 * layer}.")
        for theirs, ours in (
            (r"transformer\.encoder\.query_scales", r"encoder.layers.\1.position_scale"),
            ("bbox_embed", r"place_heads.\1.distances"),
            ("point_embed", r"place_heads.\1.point"),
        )
        for layer in (0, 1, 2)
    ),
    *((rf"class_embed\.([01])\.layers\.{layer}\.", rf"class_heads.\1.{2 * layer}.") for layer in (0, 1, 2)),
    *(
        (rf"transformer\.point_transfer\.{number}\.", f"point_map.{kind}.{number // 3}.")
        for number, kind in enumerate(("convolutions", "norms", "") * 3)
        if kind
    ),
    # The first layer's content has further parts.
    (r"transformer\.decoder\.layers\.0\.ca_qcontent_proj\.", "decoder.0.cross_attention.query.content."),
    (r"transformer\.decoder\.layers\.(\d+)\.ca_qcontent_proj\.", r"decoder.\1.cross_attention.query."),
    *(
        (rf"transformer\.encoder\.layers\.(\d+)\.{theirs}", rf"encoder.layers.\1.{ours}")
        for theirs, ours in _ENCODER_LAYER
    ),
    *((rf"transformer\.decoder\.layers\.(\d+)\.{theirs}", rf"decoder.\1.{ours}") for theirs, ours in _DECODER_LAYER),
)
_STACKED = re.compile(r"transformer\.encoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)$")
_ALIASES = re.compile(
    # Shared modules under a second name.
    r"transformer\.decoder\.(bbox_embed|point_embed|ref_point_head|ref_bbox_head)\.|class_embed\.([2-9]|\d\d)\."
)
_GRID = "refpoint_embed.weight"


class PublishedSAPDETR:
    """Files with the authors' names."""

    looked_for = "refpoint_embed.weight, refbbox_embed.weight and transformer.point_transfer.0.weight"

    def identify(self, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> SAPDETRConfig | None:
        """Backbone, classes and widths, read off the tensors; the dilation, which none shows, off the arguments.

        Without arguments the backbone is taken to have none.
        """
        if any(name not in state for name in self.looked_for.replace(" and ", ", ").split(", ")):
            return None
        backbone = resnet_of(state, "backbone.0.body.")
        if backbone is None:
            raise ValueError("a SAP-DETR whose backbone is none that is known here")
        if "class_embed.0.layers.2.weight" not in state:
            raise ValueError("a SAP-DETR without class_embed.0.layers.2.weight; is the file whole?")
        rows = len(state["class_embed.0.layers.2.weight"])
        config = SAPDETRConfig(
            backbone=backbone,
            dilation=bool(description.get("dilation", False)),
            num_classes=len(COCO_CATEGORIES) if rows == ROWS_OF_COCO else rows,
            size=_size(state),
        )
        if not _is_grid(state[_GRID], config):
            raise ValueError(
                f"{_GRID} is not the grid of {config.columns} columns and {config.rows} rows that is known here"
            )
        return config

    def translate(self, name: str, value: Tensor, config: SAPDETRConfig) -> Iterator[tuple[str, Tensor]] | None:
        """The tensor under our name, without the rows of ids that no category of COCO has."""
        if _ALIASES.match(name) or name == _GRID:
            return iter(())
        if (stacked := _STACKED.match(name)) is not None:
            layer, leaf = stacked.groups()
            names = (f"encoder.layers.{layer}.attention.{part}.{leaf}" for part in ("query", "key", "value"))
            return zip(names, value.chunk(3), strict=True)
        ours = renamed(name, _NAMES)
        if ours is None:
            return None
        if name.startswith("class_embed") and config.classes == len(COCO_CATEGORIES) and len(value) == ROWS_OF_COCO:
            value = value[list(COCO_CATEGORIES)]
        return iter([(ours, value)])


def _is_grid(logits: Tensor, config: SAPDETRConfig) -> bool:
    grid = grid_points(config)
    return logits.shape == grid.shape and torch.allclose(logits.float().sigmoid(), grid, rtol=0, atol=1e-5)


def _size(state: Mapping[str, Tensor]) -> ModelSize:
    def layers(part: str) -> int:
        return sum(
            re.fullmatch(rf"transformer\.{part}\.layers\.\d+\.linear1\.weight", name) is not None for name in state
        )

    channels = len(state["transformer.point_transfer.0.weight"])
    return ModelSize(
        backbone_width=len(state["backbone.0.body.conv1.weight"]),
        channels=channels,
        feed_forward=len(state["transformer.encoder.layers.0.linear1.weight"]),
        encoder_layers=layers("encoder"),
        decoder_layers=layers("decoder"),
    )
