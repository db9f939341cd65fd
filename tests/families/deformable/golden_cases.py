"""The golden cases of the family: two folders, detectors with their weights, and what happens inside of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asag import build_detector, load_published
from asag.families.deformable.config import DeformableConfig, ModelSize
from asag.families.deformable.detector import DeformableDetector
from asag.training.protocol import Target
from tests.builders import normalized_batch
from tests.golden_files import GOLDENS, module

SPARSE, RECOLLECTED = GOLDENS / "sparse_detr", GOLDENS / "sqr"


def names(folder: Path, start: str) -> list[str]:
    return sorted(path.stem for path in folder.glob(f"{start}*.npz")) or ["none"]


def config_of(options: Mapping[str, Any]) -> DeformableConfig:
    """Of a case's switches, with all 91 rows of classes."""
    if "model" in options:
        return DeformableConfig(queries=options["queries"], projection_bias=False, clip_boxes=True, dropout=0.0)
    two_stage = options["two_stage"]
    return DeformableConfig(
        options["backbone"],
        options["num_queries"],
        options["num_classes"],
        head_per_layer=options["with_box_refine"],
        refine_boxes=two_stage or bool(options["decoder_refines"]),
        two_stage=two_stage,
        content_from_memory=options["eff_query_init"],
        rank_by_class=options["eff_specific_head"],
        keeping_ratio=options["rho"] or None,
        encoder_heads=options["use_enc_aux_loss"],
        dropout=0.0,
        size=ModelSize(backbone_width=96 if options["backbone"] == "swin-t" else 64),
    )


def published_shapes(folder: Path, name: str, queries: int) -> dict[str, list[int]]:
    """Names and shapes of a published file's tensors, with another number of learned queries."""
    shapes = json.loads((folder / f"{name}.shapes.json").read_text())
    for query in ("query_embed.weight", "bbox_head.query_embedding.weight"):
        if query in shapes:
            shapes[query][0] = queries
    return shapes


@functools.lru_cache(maxsize=1)
def golden_state(folder: Path, name: str, queries: int, shared_heads: bool) -> dict[str, NDArray]:
    shapes = published_shapes(folder, name, queries)
    if folder == RECOLLECTED:
        return module(folder).golden_state_dict(shapes)
    return module(folder).golden_state_dict(shapes, shared_heads)


def state_of(folder: Path, meta: Mapping[str, Any]) -> dict[str, NDArray]:
    """The weights of a case by their published names."""
    options = meta["options"]
    if folder == RECOLLECTED:
        return golden_state(folder, "deformable_r50_300", options["queries"], True)
    shapes = meta["shapes"].removesuffix(".shapes.json")
    learned = options["num_queries"] if not options["two_stage"] else 0
    return golden_state(folder, shapes, learned, meta["shared_heads"])


def golden_detector(folder: Path, meta: Mapping[str, Any]) -> DeformableDetector:
    detector = build_detector(config_of(meta["options"]))
    load_published(detector, state_of(folder, meta))
    assert isinstance(detector, DeformableDetector)
    return detector


def golden_batch(meta: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Images padded to the largest height and width, and the sizes of their content."""
    pictures = [module(GOLDENS).golden_image(*arguments) for arguments in meta["images"]]
    height, width = np.max([picture.shape[:2] for picture in pictures], axis=0)
    return normalized_batch(pictures, int(height), int(width))


def targets_of(case: Mapping[str, NDArray], images: int) -> list[Target]:
    """Boxes are `cxcywh` fractions of the content."""
    return [
        {
            "boxes": torch.from_numpy(case[f"target{image}_boxes"]).float().reshape(-1, 4),
            "labels": torch.from_numpy(case[f"target{image}_labels"]).long(),
        }
        for image in range(images)
    ]
