"""The golden cases of AdaMixer: their folder, and detectors with their weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asag import build_detector, load_published
from asag.families.adamixer.config import AdaMixerConfig
from asag.families.adamixer.detector import AdaMixerDetector
from asag.families.adamixer.geometry import decode_xyzr
from tests.builders import normalized_batch
from tests.golden_files import GOLDENS, Case, module
from tests.golden_files import read_case as read_case_of

FOLDER = GOLDENS / "sqr"
SHAPES = {"resnet50": "adamixer_r50_100", "resnet101": "adamixer_r101_300"}


def read_case(name: str) -> Case:
    """A case of the folder."""
    return read_case_of(FOLDER, name)


def published_shapes(options: Mapping[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of a published file's tensors."""
    shapes = json.loads((FOLDER / f"{SHAPES[options['backbone']]}.shapes.json").read_text())
    return module(FOLDER).golden_shapes(shapes, options["queries"], options["stages"])


@functools.lru_cache(maxsize=1)
def _state(backbone: str, queries: int, stages: int) -> dict[str, NDArray]:
    options = {"backbone": backbone, "queries": queries, "stages": stages}
    return module(FOLDER).golden_state_dict(published_shapes(options))


def config_of(options: Mapping[str, Any]) -> AdaMixerConfig:
    return AdaMixerConfig(options["backbone"], options["queries"], options["stages"])


def golden_detector(meta: Mapping[str, Any]) -> AdaMixerDetector:
    config = config_of(meta["options"])
    state = _state(config.backbone, config.queries, config.stages)
    # The starting boxes alone differ; making all weights again for each case would take longer than the detector.
    boxes = {name: list(value.shape) for name, value in state.items() if "init_proposal_bboxes" in name}
    detector = build_detector(config)
    load_published(detector, state | module(FOLDER).golden_state_dict(boxes, meta["initial_boxes"]))
    assert isinstance(detector, AdaMixerDetector)
    return detector


def golden_batch(meta: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Images padded to multiples of 32, and the sizes of their content."""
    pictures = [module(FOLDER.parent).golden_image(*arguments) for arguments in meta["images"]]
    height, width = (-(-side // 32) * 32 for side in np.max([picture.shape[:2] for picture in pictures], axis=0))
    return normalized_batch(pictures, height, width)


@torch.no_grad()
def all_values(detector: AdaMixerDetector, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    """What the sections of a case are named after, whole: `c2`.., `p2`.., `initial_*`, and of every stage `_logits`,
    `_xyzr`, `_boxes` (corners in pixels) and `_content`.
    """
    maps = detector.backbone(images)
    features = detector.neck(maps)
    found = {f"c{level}": value for level, value in enumerate(maps, start=2)}
    found |= {f"p{level}": value for level, value in enumerate(features, start=2)}
    queries, xyzr = detector.start(sizes)
    found |= {"initial_content": queries, "initial_xyzr": xyzr}
    for number, layer in enumerate(detector.decoder):
        if number == 0:
            found |= first_stage(layer, features, queries, xyzr)
        queries, xyzr = layer(features, queries, xyzr, decode_xyzr(xyzr))
        name = f"stage{number}"
        found |= {f"{name}_content": queries, f"{name}_xyzr": xyzr, f"{name}_boxes": corners(xyzr)}
        found[f"{name}_logits"] = layer.branches.logits(queries)
    return found


def corners(xyzr: Tensor) -> Tensor:
    centre, half = decode_xyzr(xyzr).split(2, dim=-1)
    return torch.cat((centre - half / 2, centre + half / 2), dim=-1)


def first_stage(layer: Any, features: list[Tensor], queries: Tensor, xyzr: Tensor) -> dict[str, Tensor]:
    """What happens inside a stage: after attention, the points, the samples, and after mixing."""
    from asag.ops.sampling_mixing import sample_pyramid

    boxes, scale = decode_xyzr(xyzr), xyzr[..., 2:3]
    attended = layer.attention(queries, xyzr, boxes)
    points = layer.sample_and_mix.sampling_points(attended, boxes, scale)
    return {
        "stage0_attention": attended,
        "stage0_points": points,
        "stage0_sampled": sample_pyramid(tuple(features), points, layer.sample_and_mix.point_unit),
        "stage0_mixed": layer.sample_and_mix(features, attended, points),
    }
