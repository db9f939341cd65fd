"""Small detectors with random weights and pictures for them, for the tests of several rooms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asag.checkpoint import CheckpointInfo, save_detector
from asag.detector import build_detector
from asag.families.asag.config import ASAGConfig
from asag.families.asag.detector import ASAGDetector
from asag.families.asag.presets import PRESETS
from asag.family import InputSpec
from asag.normalization import IMAGE_MEAN, IMAGE_STD

CATEGORY_IDS = (1, 3, 7)
CATEGORY_NAMES = ("circle", "square", "star")


def small_config(**changes: Any) -> ASAGConfig:
    """`asag-a-tiny` with an even thinner backbone, few patches and three classes; `changes` replaces fields."""
    tiny = PRESETS["asag-a-tiny"].config
    size = dataclasses.replace(tiny.size, backbone_width=8, anchor_hidden=64, feed_forward=64, encoder_layers=2)
    small = {"num_classes": len(CATEGORY_IDS), "size": size, "patch_capacity": (6, 8)}
    return dataclasses.replace(tiny, **{**small, **changes})


def small_info(input_size: tuple[int, int] = (160, 192)) -> CheckpointInfo:
    return CheckpointInfo(
        "asag-a-tiny", CATEGORY_IDS, CATEGORY_NAMES, InputSpec(min(input_size), max(input_size), input_size)
    )


def random_detector(config: ASAGConfig | None = None, seed: int = 0, confidence_shift: float = 0.0) -> ASAGDetector:
    """A detector whose layers all matter: what training would start at zero is random too.

    Anchors get different sizes and confidences, many small and between the probing thresholds; `confidence_shift` is
    added to the logits of the confidences.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = build_detector(config or small_config())
        assert isinstance(detector, ASAGDetector)
        with torch.no_grad():
            for name, parameter in detector.named_parameters():
                if "box_deltas" in name or "offsets.weight" in name:
                    parameter.normal_(std=0.1)
                elif name.endswith("class_logits.bias"):
                    parameter.normal_(-2.0, 0.5)
            for norm in detector.backbone.norms():
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.8, 1.2)
                norm.weight.uniform_(0.8, 1.2)
                norm.bias.normal_(std=0.1)
            generator = detector.anchor_generator
            for mlp in (generator.fixed_mlp, generator.probed_mlp):
                mlp[-1].weight.normal_(std=0.4)
                bias = torch.randn(mlp[-1].out_features // 5, 5) * 0.5
                bias += torch.tensor((0.0, 0.0, -1.2, -1.2, -1.0 + confidence_shift))
                mlp[-1].bias.copy_(bias.flatten())
    return detector


def random_picture(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """A uint8 RGB array [height, width, 3] of blotches and rectangles."""
    generator = np.random.default_rng(seed)
    rows, columns = np.arange(height) * 7 // max(height, 7), np.arange(width) * 7 // max(width, 7)
    picture = generator.integers(40, 216, (7, 7, 3))[rows][:, columns]
    for _ in range(12):
        y, x = generator.integers(0, height), generator.integers(0, width)
        h, w = generator.integers(3, 40, 2)
        picture[y : y + h, x : x + w] = generator.integers(0, 256, 3)
    return picture.astype(np.uint8)


def uint8_batch(pictures: Sequence[NDArray[np.uint8]], height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pictures [h, w, 3] placed top left in zeros -> images [B, 3, height, width] uint8 and sizes [B, 2] float32."""
    images = torch.zeros((len(pictures), 3, height, width), dtype=torch.uint8)
    for index, picture in enumerate(pictures):
        images[index, :, : picture.shape[0], : picture.shape[1]] = torch.from_numpy(picture).permute(2, 0, 1)
    return images, torch.tensor([picture.shape[:2] for picture in pictures], dtype=torch.float32).reshape(-1, 2)


def normalized_batch(pictures: Sequence[NDArray[np.uint8]], height: int, width: int) -> tuple[Tensor, Tensor]:
    """Like :func:`uint8_batch`, normalized float32 images with zeros around the content."""
    images = torch.zeros((len(pictures), 3, height, width))
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    for index, picture in enumerate(pictures):
        pixels = (torch.from_numpy(picture) / 255 - mean) / std
        images[index, :, : picture.shape[0], : picture.shape[1]] = pixels.permute(2, 0, 1)
    return images, torch.tensor([picture.shape[:2] for picture in pictures], dtype=torch.float32).reshape(-1, 2)


def write_checkpoint(path: Path, detector: ASAGDetector | None = None, info: CheckpointInfo | None = None) -> Path:
    """A checkpoint of a random small detector."""
    save_detector(path, detector or random_detector(), info or small_info())
    return path
