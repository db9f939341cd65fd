"""An exponential moving average of a detector's weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def average_of(detector: nn.Module, decay: float) -> AveragedModel:
    """A copy of `detector` (as `.module`) that follows it: call ``update_parameters(detector)`` after every step.

    After n updates the decay is ``min(decay, (1 + n) / (10 + n))``, so that the random weights of the start are
    forgotten soon. Norm statistics are averaged as well; whole-number buffers are copied.
    """

    def mix(averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        if not averaged.is_floating_point():
            return current
        count = float(updates)
        return averaged.lerp(current, 1 - min(decay, (1 + count) / (10 + count)))

    average = AveragedModel(detector, avg_fn=mix, use_buffers=True)
    average.requires_grad_(False)
    return average.eval()
