"""One optimizer step, in as many pieces and processes as the run has."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from asag.detector import Detector
from asag.normalization import ImageNormalization
from train.checkpointing import TrainingState
from train.config import TrainConfig
from train.criterion import BatchTotals, DetectionCriterion, count_totals
from train.dataset import Target
from train.denoising import noise_scale
from train.forward import TrainingForward, count_patches
from train.processes import ALONE, Processes
from asag.training.randomness import Place, image_generators
from asag.training.timing import PartTimer
from asag.training.transfer import to_device
from train.transforms import Batch

logger = logging.getLogger(__name__)

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The name of DistributedDataParallel's option from PyTorch 2.14 on, and before.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_BUFFERS_STAY: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers": False
}


def feature_precision(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """What backbone and neck compute in under autocast; None for float32."""
    if config.precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return PRECISIONS[config.precision]


def uses_channels_last(config: TrainConfig, device: torch.device) -> bool:
    """Whether backbone and neck keep a pixel's channels side by side in memory."""
    return config.channels_last if config.channels_last is not None else device.type == "cuda"


@dataclass(frozen=True)
class Piece:
    """A part of a step's batch: its images and which ones they are."""

    batch: Batch
    places: Sequence[Place]


@dataclass(frozen=True)
class StepResult:
    """Unweighted losses by name (of this process's images, over the divisors of the whole step), and the norm of the
    gradient before clipping."""

    losses: dict[str, Tensor]
    gradient_norm: Tensor


class StepMaker:
    """Makes optimizer steps: forward, losses, gradients, clipping, update, schedule and average.

    The losses' divisors count the whole step: all its pieces in all processes. Gradients are averaged over processes by
    DistributedDataParallel, so a step is the same however it is cut.
    """

    def __init__(
        self,
        state: TrainingState,
        criterion: DetectionCriterion,
        config: TrainConfig,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self._state, self._criterion, self._config, self._device = state, criterion, config, device
        self._processes = processes
        self._normalize = ImageNormalization().to(device)
        self._precision = feature_precision(config, device)
        self.timer = PartTimer(enabled=device.type == "cpu")
        criterion.timer = self.timer
        detector = state.detector
        self._channels_last = uses_channels_last(config, device)
        self._forward: nn.Module = TrainingForward(detector)
        self._synchronized: DistributedDataParallel | None = None
        if processes.several:
            self._synchronized = DistributedDataParallel(
                self._forward,
                # With all levels every parameter has a gradient, even in a step without patches.
                find_unused_parameters=len(detector.config.probed_levels) < 2,
                gradient_as_bucket_view=True,
                # Frozen statistics are equal; those that learn are kept so by `synchronize_norms` or after every step.
                **_BUFFERS_STAY,
            )
            self._forward = self._synchronized
        self._separate_statistics = _separate_statistics(detector) if processes.several else []

    def make(self, pieces: Sequence[Piece], epoch: int) -> StepResult:
        """One step on the pieces of this process. Raises ValueError when the loss is not finite."""
        state = self._state
        state.optimizer.zero_grad(set_to_none=True)
        totals = self._count(pieces, epoch) if len(pieces) > 1 else None
        losses: dict[str, Tensor] = {}
        for number, piece in enumerate(pieces, start=1):
            with self._exchange(number == len(pieces)):
                for name, value in self._gradients(piece, epoch, totals).items():
                    losses[name] = losses[name] + value if name in losses else value
        with self.timer.part("update"):
            state.scaler.unscale_(state.optimizer)
            gradient_norm = nn.utils.clip_grad_norm_(state.detector.parameters(), self._config.gradient_clip)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            _advance(state)
            self._average_statistics()
            if state.average is not None:
                state.average.update_parameters(state.detector)
        return StepResult(losses, gradient_norm)

    def _gradients(self, piece: Piece, epoch: int, totals: BatchTotals | None) -> dict[str, Tensor]:
        """Add the gradients of one piece; its losses, detached."""
        with self.timer.part("forward"):
            images, sizes, targets = self._inputs(piece)
            outputs = self._forward(
                images,
                sizes,
                targets,
                epoch=epoch,
                generator=image_generators(self._config.seed, piece.places),
                denoising_scale=self._denoising_scale(epoch),
                feature_precision=self._precision,
            )
        with self.timer.part("loss"):
            losses: dict[str, Tensor] = self._criterion(outputs, targets, totals)
            total = self._criterion.total(losses)
            if not torch.isfinite(total):
                raise ValueError(
                    f"the loss became {float(total.detach())} at step {self._state.step + 1}: lower the learning rate"
                    f" ({self._config.learning_rate:g}), or resume from the last checkpoint"
                )
        with self.timer.part("backward"):
            self._state.scaler.scale(total).backward()
        return {name: value.detach() for name, value in losses.items()}

    def _count(self, pieces: Sequence[Piece], epoch: int) -> BatchTotals:
        """What the losses of a step of several pieces are divided by.

        How many patches there will be is only known once the anchors are predicted, so the first part of the forward
        pass runs twice.
        """
        objects = patches = 0
        with self.timer.part("forward"):
            for piece in pieces:
                images, sizes, targets = self._inputs(piece)
                generators = image_generators(self._config.seed, piece.places)
                patches += count_patches(
                    self._state.detector, images, sizes, targets, epoch, generators, self._precision
                )
                objects += sum(len(target["boxes"]) for target in targets)
        images_of_step = sum(len(piece.places) for piece in pieces)
        return count_totals(objects, patches, self._device, images_of_step)

    def _inputs(self, piece: Piece) -> tuple[Tensor, Tensor, list[Target]]:
        """Normalized images on the device; sizes and targets, by which patches are chosen, stay on the CPU."""
        batch = piece.batch
        images = batch.images.to(self._device, non_blocking=True)
        images = self._normalize(images, to_device(batch.sizes, self._device))
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, batch.sizes, batch.targets

    def _average_statistics(self) -> None:
        """Make running statistics that each process learned on its own images alike in all of them."""
        own = self._separate_statistics
        if own:
            means = self._processes.mean(torch.cat(own)).split([len(statistics) for statistics in own])
            for statistics, mean in zip(own, means, strict=True):
                statistics.copy_(mean)

    def _exchange(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients of the processes are exchanged once, with those of the last piece."""
        if self._synchronized is None or last:
            return contextlib.nullcontext()
        return self._synchronized.no_sync()

    def _denoising_scale(self, epoch: int) -> float | None:
        """Scale of the noised queries in an epoch; None without them, and once it has fallen to nothing."""
        if self._config.denoising_scale is None:
            return None
        return noise_scale(epoch, self._config.denoising_scale, self._config.denoising_fall) or None


def _advance(state: TrainingState) -> None:
    """Move the schedule on, also past a step that the scaler left out because a float16 gradient was not finite."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        state.schedule.step()


def prepare_detector(
    detector: Detector, config: TrainConfig, device: torch.device, processes: Processes = ALONE
) -> None:
    """Move a detector to the device, in the layout and with the compilation that the configuration asks for."""
    detector.to(device).train()
    synchronize_norms(detector, device, processes)
    channels_last = uses_channels_last(config, device)
    for name in ("backbone", "neck"):
        part = detector.get_submodule(name)
        if channels_last:
            part.to(memory_format=torch.channels_last)
        if config.compile:
            part.compile()


def synchronize_norms(detector: Detector, device: torch.device, processes: Processes) -> None:
    """Let norms that learn their statistics see the images of all processes, on a GPU. Tensors and names stay.

    PyTorch has such norms for GPUs alone. On a CPU each process normalizes by its own images; the running statistics
    are averaged after every step (`StepMaker`), and a warning says so.
    """
    if not processes.several or not detector.config.train_batch_statistics:
        return
    if device.type == "cuda":
        detector.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(detector.backbone)
    elif processes.is_main:
        logger.warning(
            "norms that learn see the images of one process at a time on a CPU: the gradients differ from those of a"
            " single process"
        )


def _separate_statistics(detector: Detector) -> list[Tensor]:
    """The running statistics [C] that a process learns on its own images."""
    norms = [norm for norm in detector.backbone.norms() if norm.training and isinstance(norm, nn.BatchNorm2d)]
    found = [statistics for norm in norms for statistics in (norm.running_mean, norm.running_var)]
    return [statistics for statistics in found if statistics is not None]
