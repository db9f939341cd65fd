"""The training loop: one call from a configuration to trained weights."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from asag.checkpoint import CheckpointInfo, save_detector
from asag.config import IMAGE_MEAN, IMAGE_STD
from runtime.files import write_json
from train.averaging import average_of
from train.checkpointing import STATE_FILE, TrainingState, has_run, load_state, save_state
from train.config import TrainConfig
from train.criterion import DetectionCriterion
from train.dataset import DetectionDataset, Target, open_training_split
from train.evaluation import describe_result, evaluate_detector, open_validation
from train.forward import training_outputs
from train.initialization import starting_detector
from train.loading import make_loader, steps_per_epoch
from train.reporting import TrainingReport
from train.schedule import build_optimizer, build_schedule
from train.transforms import Batch, TrainingTransform, normalize_images

if TYPE_CHECKING:
    from runtime.coco_evaluation import CocoFolder, CocoResult

WEIGHTS_FILE = "weights.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    output: Path
    weights: Path
    """The checkpoint for export and evaluation (the averaged weights where there are such)."""
    step: int
    total_steps: int
    seconds: float
    """Time of this process in the loop, evaluation included."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Unweighted mean losses of the last log line, and their weighted ``total``."""
    evaluation: CocoResult | None = None
    """COCO results of the last weights, where the run is finished and was to evaluate."""

    @property
    def finished(self) -> bool:
        """Whether all steps were made; else the run can be resumed."""
        return self.step >= self.total_steps


@dataclass
class _Run:
    """What the steps of one process share."""

    config: TrainConfig
    dataset: DetectionDataset
    info: CheckpointInfo
    state: TrainingState
    criterion: DetectionCriterion
    device: torch.device
    total_steps: int
    steps_per_epoch: int

    def computation(self) -> dict[str, Any]:
        """What decides the sequence of weights: the configuration and the data."""
        counts = self.dataset.counts
        data = {"images": counts.images, "objects": counts.objects, "category_ids": self.dataset.category_ids}
        return {**self.config.computation(), **data}

    def epoch(self, step: int) -> int:
        return self.config.first_epoch + step // self.steps_per_epoch


def train(config: TrainConfig, progress: bool = True) -> TrainResult:
    """Train a detector as `config` says; `progress` shows a bar and log lines in the terminal.

    The run's folder gets ``config.json``, ``losses.csv``, ``weights.safetensors`` and ``state.pt``; with
    ``config.resume`` the run goes on from the last one, and on the CPU ends with the same weights, bit by bit, as a run
    without interruption. Sets the seeds of torch's global random numbers.

    Raises FileNotFoundError or ValueError, with a line that says what to do, for a missing or wrong dataset, a folder
    that already holds a run, starting weights that do not fit, and a loss that is no longer finite.
    """
    device = resolve_device(config.device)
    if has_run(config.output) and not config.resume:
        raise ValueError(f"{config.output} already holds a training run: resume it or name another folder")
    dataset = open_training_split(config.data, config.train_split)
    validation = None
    if config.evaluation_interval != 0:
        validation = open_validation(config.data, config.val_split, dataset.category_ids)
    run = _prepare(config, dataset, device)
    _write_configuration(run)
    began = time.perf_counter()
    with TrainingReport(config.output, run.criterion.weights, run.total_steps, run.state.step, progress) as report:
        report.say(f"training images: {dataset.counts.sentence()}")
        report.say(f"{run.total_steps} steps of {min(config.batch_size, len(dataset))} images on {device}")
        evaluation = _make_steps(run, report, validation, began)
    return TrainResult(
        output=config.output,
        weights=config.output / WEIGHTS_FILE,
        step=run.state.step,
        total_steps=run.total_steps,
        seconds=time.perf_counter() - began,
        losses=report.last_losses,
        evaluation=evaluation,
    )


def resolve_device(name: str) -> torch.device:
    """The torch device called `name`, with ``auto`` for a GPU where there is one. ValueError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: choose auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} asked for, but torch sees no GPU: choose cpu")
    return device


def _prepare(config: TrainConfig, dataset: DetectionDataset, device: torch.device) -> _Run:
    """Build the detector and all that trains it, at the start or where the resumed run stood."""
    torch.manual_seed(config.seed)
    detector, info = starting_detector(config, dataset)
    detector.to(device).train()
    per_epoch = steps_per_epoch(len(dataset), config.batch_size)
    total = config.steps if config.steps is not None else max(1, round(config.epochs * per_epoch))
    optimizer = build_optimizer(detector, config)
    state = TrainingState(
        detector=detector,
        average=None if config.ema_decay is None else average_of(detector, config.ema_decay),
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config, total, per_epoch),
        generator=torch.Generator().manual_seed(config.seed),
    )
    criterion = DetectionCriterion(len(dataset.category_ids)).to(device)
    run = _Run(config, dataset, info, state, criterion, device, total, per_epoch)
    if config.resume:
        load_state(config.output / STATE_FILE, state, run.computation())
    return run


def _make_steps(run: _Run, report: TrainingReport, validation: CocoFolder | None, began: float) -> CocoResult | None:
    """Make the remaining steps with their log lines, checkpoints and evaluations."""
    config, state = run.config, run.state
    last = run.total_steps if config.stop_after is None else min(run.total_steps, config.stop_after)
    evaluation = None
    for seconds_waited, (images, sizes, targets) in _timed(_batches(run, last)):
        started = time.perf_counter()
        learning_rate = float(state.schedule.get_last_lr()[0])
        losses, gradient_norm = _training_step(run, images, sizes, targets)
        state.step += 1
        step = state.step
        report.step(losses, gradient_norm, len(targets), seconds_waited + time.perf_counter() - started)
        out_of_time = config.time_limit is not None and time.perf_counter() - began >= config.time_limit
        stopping = step == last or out_of_time
        if stopping or step == 1 or step % config.log_interval == 0:
            report.line(step, run.epoch(step - 1), learning_rate)
        if stopping or step % config.checkpoint_interval == 0:
            _save(run)
        if validation is not None and _evaluates_at(config, step, run.total_steps):
            evaluation = _evaluate(run, validation, report)
        if stopping:
            break
    if not (config.output / WEIGHTS_FILE).exists():
        _save(run)
    if state.step < run.total_steps:
        report.say(f"stopped after {state.step} of {run.total_steps} steps; resume the run to go on")
        return None
    if validation is not None and evaluation is None:
        evaluation = _evaluate(run, validation, report)
    return evaluation


def _training_step(run: _Run, images: Tensor, sizes: Tensor, targets: list[Target]) -> tuple[dict[str, Tensor], Tensor]:
    """One optimizer step on normalized images [B, 3, H, W]; the losses by name and the gradient's norm before clipping.

    Raises ValueError when the loss is not finite.
    """
    state = run.state
    outputs = training_outputs(
        state.detector,
        images,
        sizes,
        targets,
        epoch=run.epoch(state.step),
        generator=state.generator,
        denoising_scale=_denoising_scale(run.config, run.epoch(state.step)),
        feature_precision=torch.bfloat16 if run.config.mixed_precision and run.device.type == "cuda" else None,
    )
    losses = run.criterion(outputs, targets)
    total = run.criterion.total(losses)
    if not torch.isfinite(total):
        raise ValueError(
            f"the loss became {float(total.detach())} at step {state.step + 1}: lower the learning rate"
            f" ({run.config.learning_rate:g}), or resume from the last checkpoint"
        )
    state.optimizer.zero_grad(set_to_none=True)
    total.backward()
    gradient_norm = nn.utils.clip_grad_norm_(state.detector.parameters(), run.config.gradient_clip)
    state.optimizer.step()
    state.schedule.step()
    if state.average is not None:
        state.average.update_parameters(state.detector)
    return losses, gradient_norm


def _denoising_scale(config: TrainConfig, epoch: int) -> float | None:
    """Scale of the noised queries in an epoch; None without them, and once it has fallen to nothing."""
    if config.denoising_scale is None:
        return None
    scale = config.denoising_scale - config.denoising_fall * epoch
    return scale if scale > 0 else None


def _batches(run: _Run, last: int) -> Iterable[tuple[Tensor, Tensor, list[Target]]]:
    """The normalized batches from the state's step up to step `last`, on the run's device."""
    config = run.config
    shorter_sides = config.training_shorter_sides or (run.info.shorter_side,)
    transform = TrainingTransform(shorter_sides, run.info.longer_side, config.flip_probability)
    loader = make_loader(
        run.dataset,
        transform,
        batch_size=config.batch_size,
        steps=last,
        seed=config.seed,
        first_step=run.state.step,
        workers=config.workers,
        pin_memory=run.device.type == "cuda",
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches, None)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(_cause(error)) from None
        if batch is None:
            return
        yield _to_device(batch, run.device)


def _cause(error: Exception) -> str:
    """The message of an error; of one that a worker process raised, without the worker's traceback around it."""
    last = str(error).strip().splitlines()[-1]
    return last.removeprefix(f"{type(error).__name__}: ")


def _to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, list[Target]]:
    images = batch.images.to(device, non_blocking=True)
    sizes = batch.sizes.to(device, non_blocking=True)
    targets = [Target(boxes=target["boxes"].to(device), labels=target["labels"].to(device)) for target in batch.targets]
    return normalize_images(images, sizes, IMAGE_MEAN, IMAGE_STD), sizes, targets


def _timed(batches: Iterable[Any]) -> Iterable[tuple[float, Any]]:
    """Each batch with the seconds that were waited for it."""
    remaining = iter(batches)
    while True:
        started = time.perf_counter()
        batch = next(remaining, None)
        if batch is None:
            return
        yield time.perf_counter() - started, batch


def _evaluates_at(config: TrainConfig, step: int, total_steps: int) -> bool:
    return step == total_steps or (config.evaluation_interval is not None and step % config.evaluation_interval == 0)


def _evaluate(run: _Run, validation: CocoFolder, report: TrainingReport) -> CocoResult:
    result = evaluate_detector(
        run.state.deployable, run.info, validation, device=run.device, images=run.config.evaluation_images
    )
    report.say(f"step {run.state.step}: {describe_result(result)}")
    return result


def _save(run: _Run) -> None:
    save_detector(run.config.output / WEIGHTS_FILE, run.state.deployable, run.info)
    save_state(run.config.output / STATE_FILE, run.state, run.computation())


def _write_configuration(run: _Run) -> None:
    """Record what was asked for and what it was run with."""
    try:
        version = importlib.metadata.version("asag")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    content = {
        "training": run.config.to_dict(),
        "detector": run.state.detector.config.to_dict(),
        "steps": run.total_steps,
        "steps_per_epoch": run.steps_per_epoch,
        "first_step": run.state.step,
        "images": run.dataset.counts.images,
        "objects": run.dataset.counts.objects,
        "device": str(run.device),
        "versions": {
            "asag": version,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
        },
    }
    write_json(run.config.output / CONFIG_FILE, content)
