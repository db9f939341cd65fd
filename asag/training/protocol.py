"""What a family's training is to the loop that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from asag.training.randomness import Generators
from asag.training.timing import PartTimer

if TYPE_CHECKING:
    from asag.detector import Detector

Target = dict[str, Tensor]
"""Objects of one image: `boxes` [n, 4] float32 (`cxcywh`, fractions of the content), `labels` [n] int64 classes."""


class Batch(NamedTuple):
    """What a step's forward pass takes."""

    images: Tensor
    """[B, 3, H, W] normalized RGB, zero-padded at the bottom and right, on the device that trains."""
    sizes: Tensor
    """[B, 2] float32 (height, width) of the content in pixels; on the CPU, like the targets: a GPU would be waited
    for where something is decided by them."""
    targets: Sequence[Target]


@dataclass(frozen=True)
class Step:
    """Where the training stands, and what its forward pass draws and computes with."""

    epoch: int
    """From 0."""
    generators: Generators = None
    """Source of every random draw, one for each image."""
    feature_precision: torch.dtype | None = None
    """What backbone and neck compute in under autocast; None for float32."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate: that of the backbone or the general one, times `factor`."""

    parameters: tuple[nn.Parameter, ...]
    backbone: bool = False
    factor: float = 1.0


class Training(Protocol):
    """The losses of one detector, and how they come about.

    A step may be cut into pieces and processes. The counts of all of them are added up, and the losses of each piece
    are divided by the sums, so that those of all pieces and processes add up to the losses of the step however it was
    cut. Parameters of the detector that no loss can reach do not require gradients.
    """

    timer: PartTimer
    """Told where the time of :meth:`losses` goes; whoever makes the steps puts one of its own here."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Of every loss that can occur, by its name; 0 for a number that is only told."""

    @property
    def parts(self) -> Mapping[str, str]:
        """Of every loss that can occur, but what is only told: what log and curves call the part that it belongs to."""

    @property
    def remarks(self) -> Sequence[str]:
        """Lines for whoever starts a run, such as what a setting costs."""

    def outputs(self, batch: Batch, step: Step) -> Any:
        """The forward pass, with gradients where they are enabled."""

    def counts(self, batch: Batch, step: Step, outputs: Any = None) -> Tensor:
        """Divisors of the losses as this piece counts them, [n] float32 on the batch's device.

        outputs: the piece's, where they are there already; without them what has to be predicted first is computed,
        without gradients, and with the running statistics of norms left alone.
        """

    def losses(self, outputs: Any, targets: Sequence[Target], totals: Tensor) -> dict[str, Tensor]:
        """Unweighted scalar losses by name; totals: the summed counts, at least 1 each."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """The parameters that train."""


SLOWNESS = 0.1
"""Factor of the rate for what moves the places that are looked at (Deformable DETR, section A.4)."""


def rates_of(detector: Detector, slow: Sequence[str] = ()) -> list[ParameterGroup]:
    """The usual groups: the backbone's parameters that train, and all others that do; slow: parts of the names of those
    that learn at a tenth of the rate.
    """
    backbone = {id(parameter) for parameter in detector.backbone.parameters()}
    found: dict[tuple[bool, float], list[nn.Parameter]] = {
        (own, factor): [] for own in (False, True) for factor in (1.0, SLOWNESS)
    }
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            factor = SLOWNESS if any(part in name for part in slow) else 1.0
            found[id(parameter) in backbone, factor].append(parameter)
    return [ParameterGroup(tuple(chosen), *rate) for rate, chosen in found.items() if chosen]
