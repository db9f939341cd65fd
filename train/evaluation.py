"""Average precision of a detector that is still in memory, through the same path as every exported model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from asag.families import find_preset
from asag.runtime.backends.pytorch_session import PyTorchSession
from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.coco_evaluation import CocoResult, evaluate
from asag.runtime.coco_file import Id
from asag.runtime.metadata import ModelMetadata
from asag.runtime.postprocessing import Detections
from asag.train.crowdhuman_evaluation import CrowdHumanResult, evaluate_crowdhuman
from asag.train.processes import Processes

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


def detect(
    detector: Detector,
    info: CheckpointInfo,
    validation: CocoFolder,
    image_ids: Sequence[Id],
    device: torch.device | str = "cpu",
) -> tuple[dict[Id, Detections], ModelMetadata]:
    """Detections of the deployed head on some images by their id, and the deployed model's description.

    The detector is copied, not changed, and torch's random numbers are left as they were.
    """
    from asag.deploy import DeployedDetector

    found: dict[Id, Detections] = {}
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
