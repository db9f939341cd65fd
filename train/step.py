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
from asag.train.checkpointing import TrainingState
from asag.train.config import TrainConfig
from asag.train.freezing import freeze_parts
from asag.train.processes import ALONE, Processes
from asag.train.transforms import Batch as LoadedBatch
from asag.training.protocol import Batch, Step, Training
from asag.training.randomness import Place, image_generators
from asag.training.timing import PartTimer
from asag.training.transfer import to_device

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

    batch: LoadedBatch
    places: Sequence[Place]


@dataclass(frozen=True)
class StepResult:
    """Unweighted losses by name, whose means over the processes are those of the step, and the norm of the gradient
    before clipping."""

    losses: dict[str, Tensor]
    gradient_norm: Tensor


class _Forward(nn.Module):
    """A training's forward pass as a module, which DistributedDataParallel takes."""

    def __init__(self, detector: Detector, training: Training) -> None:
        super().__init__()
        self.detector = detector
        self._outputs = training.outputs

    def forward(self, batch: Batch, step: Step) -> Any:
        return self._outputs(batch, step)


class StepMaker:
    """Makes optimizer steps: forward, losses, gradients, clipping, update, schedule and average.

    The losses' divisors count the whole step: all its pieces in all processes. So a step is the same however it is cut.
    """

    def __init__(
        self,
        state: TrainingState,
        training: Training,
        config: TrainConfig,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self._state, self._training, self._config, self._device = state, training, config, device
        self._processes = processes
        self._normalize = ImageNormalization().to(device)
        self._precision = feature_precision(config, device)
        self.timer = training.timer = PartTimer(enabled=device.type == "cpu")
        self._channels_last = uses_channels_last(config, device)
        self._forward: nn.Module = _Forward(state.detector, training)
        self._synchronized: DistributedDataParallel | None = None
        if processes.several:
            self._synchronized = DistributedDataParallel(
                self._forward,
                gradient_as_bucket_view=True,
                # Frozen statistics are equal; those that learn are kept so by `synchronize_norms` or after every step.
                **_BUFFERS_STAY,
            )
            self._forward = self._synchronized
        self._separate_statistics = _separate_statistics(state.detector) if processes.several else []

    def make(self, pieces: Sequence[Piece], epoch: int) -> StepResult:
        """One step on the pieces of this process; epochs from 0. Raises ValueError when the loss is not finite."""
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

    def _gradients(self, piece: Piece, epoch: int, totals: Tensor | None) -> dict[str, Tensor]:
        """Add the gradients of one piece; its losses, detached. totals: None where the piece is the whole step."""
        with self.timer.part("forward"):
            batch, step = self._inputs(piece, epoch)
            outputs = self._forward(batch, step)
        with self.timer.part("loss"):
            if totals is None:
                totals = self._summed(self._training.counts(batch, step, outputs))
            losses = self._training.losses(outputs, batch.targets, totals)
            # DistributedDataParallel averages what the processes' own images give; their sum is wanted.
            losses = {name: value * self._processes.count for name, value in losses.items()}
            total = torch.stack([value * self._training.weights[name] for name, value in losses.items()]).sum()
            if not torch.isfinite(total):
                raise ValueError(
                    f"the loss became {float(total.detach())} at step {self._state.step + 1}: lower the learning rate"
                    f" ({self._config.learning_rate:g}), or resume from the last checkpoint"
                )
        with self.timer.part("backward"):
            self._state.scaler.scale(total).backward()
        return {name: value.detach() for name, value in losses.items()}

    def _count(self, pieces: Sequence[Piece], epoch: int) -> Tensor:
        """What the losses of a step of several pieces are divided by.

        Some of it is known only once the detector has predicted it, so a part of the forward pass may run twice.
        """
        with self.timer.part("forward"):
            counts = [self._training.counts(*self._inputs(piece, epoch)) for piece in pieces]
        return self._summed(torch.stack(counts).sum(0))

    def _summed(self, counts: Tensor) -> Tensor:
        """Counts of this process -> those of all of them, at least 1 each."""
        return self._processes.sum(counts).clamp(min=1)

    def _inputs(self, piece: Piece, epoch: int) -> tuple[Batch, Step]:
        """What the forward pass takes, with random numbers that are drawn alike each time."""
        loaded = piece.batch
        images = loaded.images.to(self._device, non_blocking=True)
        images = self._normalize(images, to_device(loaded.sizes, self._device))
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        step = Step(epoch, image_generators(self._config.seed, piece.places), self._precision)
        return Batch(images, loaded.sizes, loaded.targets), step

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


def _advance(state: TrainingState) -> None:
    """Move the schedule on, also past a step that the scaler left out because a float16 gradient was not finite."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        state.schedule.step()


def prepare_detector(
    detector: Detector, config: TrainConfig, device: torch.device, processes: Processes = ALONE
) -> None:
    """Move a detector to the device, frozen, laid out and compiled as the configuration asks."""
    detector.to(device).train()
    synchronize_norms(detector, device, processes)
    freeze_parts(detector, config.freeze)
    channels_last = uses_channels_last(config, device)
    for part in (detector.backbone, detector.neck):
        if channels_last:
            part.to(memory_format=torch.channels_last)
        if config.compile:
            part.compile()


def synchronize_norms(detector: Detector, device: torch.device, processes: Processes) -> None:
    """Let norms that learn their statistics see the images of all processes, on a GPU. Tensors and names stay.

    PyTorch has such norms for GPUs alone. On a CPU each process normalizes by its own images; the running statistics
    are averaged after every step (`StepMaker`), and a warning says so.
    """
    if not processes.several or not detector.backbone.train_statistics:
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
