"""Average precision of a detector that is still in memory, through the same path as every exported model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from runtime.coco_evaluation import CocoFolder, CocoResult, evaluate_session, open_coco
from runtime.pytorch_session import PyTorchSession

if TYPE_CHECKING:
    from asag.checkpoint import CheckpointInfo
    from asag.detector import Detector

EVALUATION_BATCH = 4


def open_validation(data: str | Path, split: str, category_ids: Sequence[int]) -> CocoFolder:
    """The validation images of a dataset folder.

    Raises FileNotFoundError when they are not there, and ValueError when their categories are not `category_ids`.
    """
    folder = open_coco(data, split)
    if tuple(folder.category_ids) != tuple(category_ids):
        raise ValueError(
            f"{folder.annotations_path} has other categories ({len(folder.category_ids)}) than the training images"
            f" ({len(category_ids)}): both splits must list the same ones"
        )
    return folder


def evaluate_detector(
    detector: Detector,
    info: CheckpointInfo,
    validation: CocoFolder,
    *,
    device: torch.device | str = "cpu",
    images: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CocoResult:
    """COCO results of the deployed head on the validation images, or the first `images` of them.

    The detector is copied, not changed, and torch's random numbers are left as they were.
    """
    from asag.deploy import DeployedDetector

    with torch.random.fork_rng():
        deployed = DeployedDetector(detector, info, input_type="uint8")
        session = PyTorchSession(deployed, info.preset, str(device))
        image_ids = validation.image_ids[:images]
        result, _ = evaluate_session(session, validation, image_ids, EVALUATION_BATCH, progress)
    return result


def describe_result(result: CocoResult) -> str:
    """One line for a person; values from 0 to 1."""
    values = {"AP": result.ap, "AP50": result.ap50, "AP75": result.ap75, "small": result.aps, "medium": result.apm}
    values["large"] = result.apl
    listed = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    return f"{listed} on {result.images} images"
