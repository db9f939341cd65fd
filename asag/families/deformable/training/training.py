"""The family's training as the loop sees it: the forward pass, the divisors and the losses of one detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from asag.families.deformable.detector import DeformableDetector
from asag.families.deformable.training.criterion import KEPT_SHARES, SELECTION, detection_losses, output_names
from asag.families.deformable.training.forward import TrainingOutputs, training_outputs
from asag.families.deformable.training.settings import DeformableSettings
from asag.training.protocol import Batch, ParameterGroup, Step, Target, rates_of
from asag.training.recollection import remarks
from asag.training.set_losses import LOSSES, WEIGHTS
from asag.training.timing import PartTimer
from asag.training.transfer import to_device

SLOW = ("attention.offsets.", "reference_points.")
"""Parts of the names of parameters that learn at a tenth of the rate: they move the places that are looked at."""


class DeformableTraining:
    """The :class:`asag.training.protocol.Training` of a detector.

    A backbone that keeps its running statistics keeps the scale and shift of its norms, too. Raises ValueError for a
    recollection that the detector does not have.
    """

    weights: Mapping[str, float]
    parts: Mapping[str, str]
    remarks: Sequence[str]

    def __init__(self, detector: DeformableDetector, settings: DeformableSettings) -> None:
        self.timer = PartTimer(enabled=False)
        self._detector, self._settings = detector, settings
        config = detector.config
        if config.refine_boxes and settings.recollection != "none":
            raise ValueError("recollection is for decoders that keep their references; this one refines its boxes")
        if not config.train_batch_statistics:
            for norm in detector.backbone.norms():
                norm.requires_grad_(False)
        self.remarks = remarks(config.size.decoder_layers, settings.recollection)
        names = output_names(config)
        self.weights = {
            f"{kind}_{name}": weight for name in names for kind, weight in zip(LOSSES, WEIGHTS, strict=True)
        }
        self.parts = {f"{kind}_{name}": _part(name) for name in names for kind in LOSSES}
        if config.sparse:
            self.weights |= {SELECTION: 1.0}
            self.weights |= dict.fromkeys(KEPT_SHARES, 0.0)
            self.parts |= {SELECTION: "selection"}

    def outputs(self, batch: Batch, step: Step) -> TrainingOutputs:
        """What every layer says, of all copies that the settings ask for."""
        return training_outputs(self._detector, batch, step, self._settings.recollection)

    def counts(self, batch: Batch, step: Step, outputs: TrainingOutputs | None = None) -> Tensor:
        """[2], objects and images."""
        objects = sum(len(target["labels"]) for target in batch.targets)
        counts = torch.tensor([objects, len(batch.targets)], dtype=torch.float32)
        return to_device(counts, batch.images.device)

    def losses(self, outputs: TrainingOutputs, targets: Sequence[Target], totals: Tensor) -> dict[str, Tensor]:
        """See :func:`asag.families.deformable.training.criterion.detection_losses`."""
        return detection_losses(self._detector.config, outputs, targets, totals, self.timer)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The backbone, what moves the places that are looked at, and the rest."""
        return rates_of(self._detector, SLOW)


def _part(name: str) -> str:
    """What log and curves call an output."""
    return f"layer {name}" if name.isdecimal() else name.replace("_", " ")
