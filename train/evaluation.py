"""Average precision of a detector that is still in memory, through the same path as every exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from asag.families import find_preset
from runtime.backends.pytorch_session import PyTorchSession
from runtime.coco_evaluation import CocoFolder, CocoResult, evaluate, open_coco
from runtime.errors import one_line
from runtime.metadata import ModelMetadata
from runtime.postprocessing import Detections
from train.crowdhuman_evaluation import CrowdHumanResult, evaluate_crowdhuman
from train.dataset import MOST_CHECKED_SIZES, missing_files, spread, upright_size
from train.processes import Processes

if TYPE_CHECKING:
    from asag.checkpoint import CheckpointInfo
    from asag.detector import Detector

EVALUATION_BATCH = 4


@dataclass(frozen=True)
class Evaluation:
    """Results of one evaluation; the ones of CrowdHuman's kind only for its detectors."""

    coco: CocoResult
    crowdhuman: CrowdHumanResult | None = None

    @property
    def score(self) -> float:
        """What decides which weights are the best: AP."""
        return self.coco.ap if self.crowdhuman is None else self.crowdhuman.ap

    def values(self) -> dict[str, float]:
        """The numbers by name, 0..1."""
        coco = self.coco
        values = {"AP": coco.ap, "AP50": coco.ap50, "AP75": coco.ap75}
        values |= {"small": coco.aps, "medium": coco.apm, "large": coco.apl}
        if self.crowdhuman is not None:
            found = self.crowdhuman
            values = {"AP": found.ap, "mMR": found.log_average_miss_rate, "recall": found.recall, "COCO AP": coco.ap}
        return values

    def sentence(self) -> str:
        """One line for a person."""
        listed = ", ".join(f"{name} {value:.3f}" for name, value in self.values().items())
        return f"{listed} on {self.coco.images} images"


def open_validation(data: str | Path, split: str, categories: Mapping[int, str]) -> CocoFolder:
    """The validation images of a dataset folder.

    Raises FileNotFoundError when they are not there, and ValueError when their categories are not `categories` (names
    by id).
    """
    return check_categories(open_coco(data, split), categories)


def check_categories(folder: CocoFolder, categories: Mapping[int, str]) -> CocoFolder:
    """The folder itself; ValueError when its categories are not `categories` (names by id)."""
    category_ids = tuple(sorted(categories))
    if tuple(folder.category_ids) != category_ids:
        raise ValueError(
            f"{folder.annotations_path} has other categories ({len(folder.category_ids)}) than the training images"
            f" ({len(category_ids)}): both splits must list the same ones"
        )
    for category_id, name in zip(folder.category_ids, folder.category_names, strict=True):
        if name != categories[category_id]:
            raise ValueError(
                f"{folder.annotations_path} calls category {category_id} {name!r}, the training images call it"
                f" {categories[category_id]!r}: both splits must list the same ones"
            )
    return folder


def check_images(folder: CocoFolder, images: int | None = None) -> CocoFolder:
    """The folder itself, once its images, or the first `images` of them, are known to be there in the stated size.

    Sizes are compared of all or, of many, of evenly spread ones; only headers are read. Raises FileNotFoundError or
    ValueError: before training, not when it is over.
    """
    image_ids = folder.image_ids[:images]
    missing = missing_files(folder.images_dir, [folder.images[image_id]["file_name"] for image_id in image_ids])
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images of {folder.annotations_path} are missing in {folder.images_dir}, the first is"
            f" {missing[0]}: complete them, or take them out of the file"
        )
    for image_id in spread(image_ids, MOST_CHECKED_SIZES):
        record, path = folder.images[image_id], folder.path(image_id)
        try:
            width, height = upright_size(path)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"cannot read image {path}: {one_line(error)}") from None
        if (width, height) != (record["width"], record["height"]):
            raise ValueError(
                f"{path} is {width} x {height} pixels, but {folder.annotations_path.name} says {record['width']} x"
                f" {record['height']}: the annotations belong to another picture"
            )
    return folder


def detect(
    detector: Detector,
    info: CheckpointInfo,
    validation: CocoFolder,
    image_ids: Sequence[int],
    device: torch.device | str = "cpu",
) -> tuple[dict[int, Detections], ModelMetadata]:
    """Detections of the deployed head on some images by their id, and the deployed model's description.

    The detector is copied, not changed, and torch's random numbers are left as they were.
    """
    from asag.deploy import DeployedDetector

    found: dict[int, Detections] = {}
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.device(device).type == "cuda" else []):
        deployed = DeployedDetector(detector, info, input_type="uint8")
        session = PyTorchSession(deployed, info.preset, str(device))
        stream = session.stream((validation.load(image_id) for image_id in image_ids), EVALUATION_BATCH)
        for image_id, detections in zip(image_ids, stream, strict=True):
            found[image_id] = detections
        metadata = session.metadata
        session.close()
    return found, metadata


def evaluate_detector(
    detector: Detector,
    info: CheckpointInfo,
    validation: CocoFolder,
    *,
    device: torch.device | str = "cpu",
    images: int | None = None,
    processes: Processes | None = None,
) -> Evaluation | None:
    """Results on the validation images, or the first `images` of them; every process detects on its share.

    Only the first process gets them; the others get None.
    """
    processes = processes or Processes()
    image_ids = validation.image_ids[:images]
    share = image_ids[processes.rank :: processes.count]
    found, _ = detect(detector, info, validation, share, device)
    gathered = processes.gather(found)
    if not processes.is_main:
        return None
    everything = {image_id: detections for part in gathered for image_id, detections in part.items()}
    ordered = {image_id: everything[image_id] for image_id in image_ids}
    crowd = find_preset(info.preset).dataset == "crowdhuman"
    crowdhuman = evaluate_crowdhuman(validation, ordered) if crowd else None
    return Evaluation(evaluate(validation, ordered), crowdhuman)
