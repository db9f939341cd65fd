"""A run of training: its data, detector and state, at the start or where it was left."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.amp import GradScaler

from asag.checkpoint import CheckpointInfo
from asag.families import family_of
from asag.runtime.coco_dataset import CocoFolder, open_coco
from asag.runtime.coco_evaluation import check_measurable
from asag.runtime.coco_file import name_key
from asag.runtime.files import write_json
from asag.train.averaging import average_of
from asag.train.checkpointing import TrainingState, has_run, remove_leftovers, resume_state
from asag.train.config import TrainConfig
from asag.train.dataset import DetectionDataset, open_training_split
from asag.train.devices import check_gpus, resolve_device
from asag.train.initialization import starting_detector
from asag.train.loading import steps_per_epoch
from asag.train.processes import Processes
from asag.train.record import git_revision, versions
from asag.train.schedule import build_optimizer, build_schedule
from asag.train.step import feature_precision, prepare_detector
from asag.training.protocol import Training

logger = logging.getLogger(__name__)

BEST_RECORD = "best.json"
CONFIG_FILE = "config.json"


@dataclass
class Run:
    """What the steps of one process share."""

    config: TrainConfig
    processes: Processes
    dataset: DetectionDataset
    validation: CocoFolder | None
    info: CheckpointInfo
    state: TrainingState
    training: Training
    device: torch.device
    total_steps: int
    steps_per_epoch: int

    def computation(self) -> dict[str, Any]:
        """What decides the sequence of weights: the configuration and the data."""
        counts = self.dataset.counts
        data = {"images": counts.images, "objects": counts.objects, "category_ids": list(self.dataset.category_ids)}
        return {**self.config.computation(), **data}

    def epoch(self, step: int) -> int:
        """Passes over the data before a step."""
        return step // self.steps_per_epoch


def prepare_run(config: TrainConfig, processes: Processes) -> Run:
    """Check the data, then build the detector and all that trains it, at the start or where the run stood.

    Raises what :func:`train.loop.train` says of data, folders and weights.
    """
    device = resolve_device(config.device)
    check_gpus(device, processes)
    if has_run(config.output) and not config.resume:
        raise ValueError(f"{config.output} already holds a training run: resume it or name another folder")
    dataset = _training_data(config)
    validation = _validation_data(config, dataset)
    torch.manual_seed(config.seed)
    detector, info = starting_detector(config, dataset)
    prepare_detector(detector, config, device, processes)
    training = family_of(detector.config).training(detector, config.settings)
    per_epoch = steps_per_epoch(len(dataset), config.batch_size)
    total = config.steps if config.steps is not None else max(1, round(config.epochs * per_epoch))
    optimizer = build_optimizer(training.parameter_groups(), config)
    state = TrainingState(
        detector=detector,
        average=None if config.ema_decay is None else average_of(detector, config.ema_decay),
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config, total, per_epoch),
        scaler=GradScaler(device.type, enabled=feature_precision(config, device) == torch.float16),
    )
    run = Run(config, processes, dataset, validation, info, state, training, device, total, per_epoch)
    if config.resume:
        resume_state(config.output, state, run.computation())
        _check_same_step(processes, state.step)
    if processes.is_main:
        remove_leftovers(config.output)
        if not config.resume:
            (config.output / BEST_RECORD).unlink(missing_ok=True)
        _write_configuration(run)
    return run


def _check_same_step(processes: Processes, step: int) -> None:
    """Check that all processes go on from the same state. Raises ValueError."""
    steps = sorted(set(processes.gather(step)))
    if len(steps) > 1:
        raise ValueError(
            f"the processes found states of different steps ({', '.join(map(str, steps))}): the run's folder must be"
            " the same one for all of them"
        )


def _training_data(config: TrainConfig) -> DetectionDataset:
    options = config.skip_missing_images, config.stored_pixels, config.background_images
    if config.train_annotations is not None:
        folder = config.train_images or config.train_annotations.parent
        return DetectionDataset(folder, config.train_annotations, *options)
    assert config.data is not None
    return open_training_split(config.data, config.train_split, *options)


def _validation_data(config: TrainConfig, dataset: DetectionDataset) -> CocoFolder | None:
    """The images to evaluate on; None where there are none, or none are wanted."""
    if config.evaluation_interval == 0:
        return None
    if config.val_annotations is not None:
        images = config.val_images or config.val_annotations.parent
        folder = CocoFolder(images, config.val_annotations, config.stored_pixels).report()
    elif config.data is not None:
        folder = open_coco(config.data, config.val_split, config.stored_pixels)
    else:
        return None
    if folder.annotations_path == dataset.annotation_file:
        logger.warning(
            "%s has one split, which is trained and evaluated on: AP says nothing about other images", config.data
        )
    folder = _with_training_classes(folder, dataset)
    check_measurable(folder, folder.image_ids[: config.evaluation_images])
    return folder


def _with_training_classes(folder: CocoFolder, dataset: DetectionDataset) -> CocoFolder:
    """Validation images may lack classes, and number them otherwise; names tell. ValueError where they have others."""
    known, theirs = (set(map(name_key, each.category_names)) for each in (dataset, folder))
    if theirs < known:
        logger.warning("%s: AP is of %d of the %d classes", folder.annotations_path, len(theirs), len(known))
    by_name = folder.category_names if theirs <= known else ()
    whose = "the classes of the training images"
    return folder.with_classes(dataset.category_ids, dataset.category_names, whose, by_name)


def _write_configuration(run: Run) -> None:
    """Record what was asked for and what it was run with."""
    content = {
        "training": run.config.to_dict(),
        "family": family_of(run.state.detector.config).name,
        "detector": asdict(run.state.detector.config),
        "steps": run.total_steps,
        "steps_per_epoch": run.steps_per_epoch,
        "first_step": run.state.step,
        "images": run.dataset.counts.images,
        "objects": run.dataset.counts.objects,
        "device": str(run.device),
        "processes": run.processes.count,
        "versions": versions(),
        "git": git_revision(),
    }
    write_json(run.config.output / CONFIG_FILE, content)
