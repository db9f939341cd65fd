"""SAP-DETR's training as the loop sees it: the forward pass, the divisor and the losses of one detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from asag.families.sap_detr.detector import SAPDETRDetector
from asag.families.sap_detr.training.criterion import CLASS_LOSS, WEIGHTS, detection_losses, loss_name
from asag.families.sap_detr.training.forward import LayerPredictions, training_outputs
from asag.families.sap_detr.training.settings import SAPDETRSettings
from asag.training.protocol import Batch, ParameterGroup, Step, Target, rates_of
from asag.training.timing import PartTimer
from asag.training.transfer import to_device


class SAPDETRTraining:
    """The :class:`asag.training.protocol.Training` of a detector.

    A backbone that keeps its running statistics keeps the scale and shift of its norms, too.
    """

    weights: Mapping[str, float]
    parts: Mapping[str, str]
    remarks: Sequence[str] = ()

    def __init__(self, detector: SAPDETRDetector, settings: SAPDETRSettings) -> None:
        self.timer = PartTimer(enabled=False)
        self._detector, self._settings = detector, settings
        if not detector.config.train_batch_statistics:
            for norm in detector.backbone.norms():
                norm.requires_grad_(False)
        layers = range(detector.config.size.decoder_layers)
        weights = {**WEIGHTS, CLASS_LOSS: settings.class_weight * WEIGHTS[CLASS_LOSS]}
        self.weights = {loss_name(kind, layer): weight for layer in layers for kind, weight in weights.items()}
        self.parts = {loss_name(kind, layer): f"layer {layer}" for layer in layers for kind in WEIGHTS}

    def outputs(self, batch: Batch, step: Step) -> tuple[LayerPredictions, ...]:
        """What every layer says."""
        return training_outputs(self._detector, batch, step)

    def counts(self, batch: Batch, step: Step, outputs: tuple[LayerPredictions, ...] | None = None) -> Tensor:
        """[1], objects."""
        objects = sum(len(target["labels"]) for target in batch.targets)
        return to_device(torch.tensor([objects], dtype=torch.float32), batch.images.device)

    def losses(
        self, outputs: tuple[LayerPredictions, ...], targets: Sequence[Target], totals: Tensor
    ) -> dict[str, Tensor]:
        """See :func:`asag.families.sap_detr.training.criterion.detection_losses`."""
        return detection_losses(outputs, targets, totals, self.timer)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The backbone, the distances that queries begin with, and the rest."""
        own, factor = self._detector.distances, self._settings.distances_rate
        groups = [
            replace(group, parameters=tuple(each for each in group.parameters if each is not own))
            for group in rates_of(self._detector)
        ]
        if own.requires_grad:
            groups.append(ParameterGroup((own,), factor=factor))
        return [group for group in groups if group.parameters]
