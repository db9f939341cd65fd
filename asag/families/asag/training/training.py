"""ASAG's training as the loop sees it: the forward pass, the divisors and the losses of one detector."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from asag.families.asag.anchors import AnchorGenerator
from asag.families.asag.detector import ASAGDetector
from asag.families.asag.training.criterion import PARTS, WEIGHTS, detection_losses
from asag.families.asag.training.denoising import noise_scale
from asag.families.asag.training.forward import TrainingOutputs, count_patches, training_outputs
from asag.families.asag.training.settings import ASAGSettings
from asag.training.protocol import Batch, ParameterGroup, Step, Target, rates_of
from asag.training.timing import PartTimer
from asag.training.transfer import to_device

SLOW = ("attention.offsets.",)
"""Parts of the names of parameters that learn at a tenth of the rate: those of deformable attention."""


class ASAGTraining:
    """The :class:`asag.training.protocol.Training` of a detector. Parts of it that no image reaches do not train."""

    weights = WEIGHTS
    parts = PARTS
    remarks = ()

    def __init__(self, detector: ASAGDetector, settings: ASAGSettings) -> None:
        self.timer = PartTimer(enabled=False)
        self._detector, self._settings = detector, settings
        _freeze_unexplored(detector.anchor_generator)

    def outputs(self, batch: Batch, step: Step) -> TrainingOutputs:
        """The forward pass of all heads, with noised queries where the settings ask for them."""
        step = self._counted(step)
        return training_outputs(self._detector, batch, step, self._denoising_scale(step.epoch))

    def counts(self, batch: Batch, step: Step, outputs: TrainingOutputs | None = None) -> Tensor:
        """[3] objects, patches of P4 and P3, and images.

        How many patches there will be is only known once the anchors are predicted.
        """
        if outputs is None:
            patches = count_patches(self._detector, batch, self._counted(step))
        else:
            patches = outputs.anchors.patches
        objects = sum(len(target["boxes"]) for target in batch.targets)
        counts = torch.tensor([objects, patches, len(batch.targets)], dtype=torch.float32)
        return to_device(counts, batch.images.device)

    def losses(self, outputs: TrainingOutputs, targets: Sequence[Target], totals: Tensor) -> dict[str, Tensor]:
        """See :func:`asag.families.asag.training.criterion.detection_losses`."""
        return detection_losses(outputs, targets, totals, self.timer)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The backbone, what moves the places that deformable attention looks at, and the rest."""
        return rates_of(self._detector, SLOW)

    def _counted(self, step: Step) -> Step:
        """The step with its epoch as the method counts them."""
        return dataclasses.replace(step, epoch=self._settings.first_epoch + step.epoch)

    def _denoising_scale(self, epoch: int) -> float | None:
        """Scale of the noised queries in an epoch; None without them, and once it has fallen to nothing."""
        if self._settings.denoising_scale is None:
            return None
        return noise_scale(epoch, self._settings.denoising_scale, self._settings.denoising_fall) or None


def _freeze_unexplored(generator: AnchorGenerator) -> None:
    """Exclude from training what levels need that the configuration does not explore: they never have a gradient, for
    which several processes would wait."""
    probed = generator.config.probed_levels
    for level in ("P4", "P3"):
        if level not in probed:
            generator.compress[level].requires_grad_(False)
            generator.norm[level].requires_grad_(False)
            generator.position[level].requires_grad_(False)
    if not probed:
        generator.probed_mlp.requires_grad_(False)
