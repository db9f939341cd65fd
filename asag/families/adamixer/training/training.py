"""AdaMixer's training as the loop sees it: the forward pass, the divisor and the losses of one detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from asag.families.adamixer.detector import AdaMixerDetector
from asag.families.adamixer.training.criterion import detection_losses, loss_name
from asag.families.adamixer.training.forward import training_outputs
from asag.families.adamixer.training.settings import AdaMixerSettings
from asag.training.protocol import Batch, ParameterGroup, Step, Target, rates_of
from asag.training.recollection import StagePredictions, remarks
from asag.training.set_losses import LOSSES, WEIGHTS
from asag.training.timing import PartTimer
from asag.training.transfer import to_device


class AdaMixerTraining:
    """The :class:`asag.training.protocol.Training` of a detector."""

    weights: Mapping[str, float]
    parts: Mapping[str, str]
    remarks: Sequence[str]

    def __init__(self, detector: AdaMixerDetector, settings: AdaMixerSettings) -> None:
        self.timer = PartTimer(enabled=False)
        self._detector, self._settings = detector, settings
        stages = range(detector.config.stages)
        self.weights = {
            loss_name(kind, stage): weight for stage in stages for kind, weight in zip(LOSSES, WEIGHTS, strict=True)
        }
        self.parts = {loss_name(kind, stage): f"stage {stage}" for stage in stages for kind in LOSSES}
        self.remarks = remarks(len(stages), settings.recollection)

    def outputs(self, batch: Batch, step: Step) -> tuple[StagePredictions, ...]:
        """What every stage says, of all copies that the settings ask for."""
        return training_outputs(self._detector, batch, step, self._settings.recollection)

    def counts(self, batch: Batch, step: Step, outputs: tuple[StagePredictions, ...] | None = None) -> Tensor:
        """[1] pairs that will be matched in every copy: an image has no more than queries."""
        queries = self._detector.config.queries
        pairs = sum(min(len(target["labels"]), queries) for target in batch.targets)
        return to_device(torch.tensor([pairs], dtype=torch.float32), batch.images.device)

    def losses(
        self, outputs: tuple[StagePredictions, ...], targets: Sequence[Target], totals: Tensor
    ) -> dict[str, Tensor]:
        """See :func:`asag.families.adamixer.training.criterion.detection_losses`."""
        return detection_losses(outputs, targets, totals[0], self.timer)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The backbone and the rest."""
        return rates_of(self._detector)
