"""The golden cases of the family: detectors with their weights, and what happens inside of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asag import load_published
from asag.families.sap_detr.config import SAPDETRConfig
from asag.families.sap_detr.detector import SAPDETRDetector
from asag.training.protocol import Target
from tests.builders import normalized_batch
from tests.golden_files import GOLDENS, module

FOLDER = GOLDENS / "sap_detr"


def names(start: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"{start}*.npz")) or ["none"]


def shapes_of(backbone: str) -> dict[str, list[int]]:
    """Names and shapes of a published file's tensors; backbone: such as "r50"."""
    return json.loads((FOLDER / f"sap_detr_{backbone}.shapes.json").read_text())


@functools.lru_cache(maxsize=1)
def golden_state(backbone: str) -> dict[str, NDArray]:
    return module(FOLDER).golden_state_dict(shapes_of(backbone))


@functools.lru_cache(maxsize=1)
def golden_detector(preset: str) -> SAPDETRDetector:
    """A published preset with all 91 rows of classes and the golden weights; all cases of it share this."""
    backbone = preset.rpartition("_")[2]
    config = SAPDETRConfig(backbone=backbone.replace("r", "resnet"), dilation="dc5" in preset, num_classes=91)
    with torch.device("meta"):  # no start to be drawn
        detector = SAPDETRDetector(config)
    load_published(detector.to_empty(device="cpu").eval(), golden_state(backbone))
    return detector


def golden_batch(meta: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Images padded to the largest height and width, and the sizes of their content."""
    pictures = [module(GOLDENS).golden_image(*arguments) for arguments in meta["images"]]
    height, width = np.max([picture.shape[:2] for picture in pictures], axis=0)
    return normalized_batch(pictures, int(height), int(width))


def targets_of(case: Mapping[str, NDArray]) -> list[Target]:
    """Boxes are `cxcywh` fractions of the content."""
    images = sum(name.endswith("_boxes") and name.startswith("target") for name in case)
    return [
        {
            "boxes": torch.from_numpy(case[f"target{image}_boxes"]).float().reshape(-1, 4),
            "labels": torch.from_numpy(case[f"target{image}_labels"]).long(),
        }
        for image in range(images)
    ]
