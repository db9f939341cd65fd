"""The optimizer, and its learning rates over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from asag.train.config import TrainConfig
from asag.training.protocol import ParameterGroup

EVALUATIONS = 12


def build_optimizer(groups: Sequence[ParameterGroup], config: TrainConfig) -> AdamW:
    """AdamW over groups of parameters, each with its own rate.

    Raises ValueError when no parameter trains.
    """
    if not groups:
        raise ValueError("the detector has no parameter that trains")
    rates = {False: config.learning_rate, True: config.backbone_learning_rate}
    parts = [{"params": group.parameters, "lr": rates[group.backbone] * group.factor} for group in groups]
    return AdamW(parts, lr=config.learning_rate, weight_decay=config.weight_decay)


LONGEST_WARMUP = 1 / 3
"""Share of a run that the warm-up may take; a short run has a shorter one."""


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Steps of the linear warm-up: the configuration's, where the run is long enough for them."""
    return min(config.warmup_steps, int(total_steps * LONGEST_WARMUP))


def learning_rate_factor(config: TrainConfig, total_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The share of the base rate at a step (from 0): linear warm-up times the chosen decay."""

    rising = warmup_steps(config, total_steps)

    def warmup(step: int) -> float:
        if step >= rising:
            return 1.0
        return config.warmup_start + (1 - config.warmup_start) * step / rising

    def decay(step: int) -> float:
        if config.schedule == "cosine":
            progress = min(step / max(1, total_steps - 1), 1.0)
            return config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
        passed = sum(step >= round(milestone * steps_per_epoch) for milestone in config.milestones)
        return config.decay_factor**passed

    return lambda step: warmup(step) * decay(step)


def evaluation_interval(config: TrainConfig, total_steps: int, steps_per_epoch: int) -> int:
    """Steps between two evaluations: the configuration's or, where it leaves that open, whole epochs, as few as give
    no more than `EVALUATIONS` in a run; 0 for no evaluation."""
    if config.evaluation_interval is not None:
        return config.evaluation_interval
    return steps_per_epoch * math.ceil(total_steps / steps_per_epoch / EVALUATIONS)


def build_schedule(optimizer: AdamW, config: TrainConfig, total_steps: int, steps_per_epoch: int) -> LambdaLR:
    """The schedule as a torch scheduler that is stepped once per optimizer step."""
    return LambdaLR(optimizer, learning_rate_factor(config, total_steps, steps_per_epoch))
