"""What every detector is to the rest of the toolkit, and how its forward pass names its stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from asag.families import family_of
from asag.family import DetectorConfig


class Predictions(NamedTuple):
    """What a detector says of B images with room for N queries each."""

    logits: Tensor
    """[B, N, classes]"""
    boxes: Tensor
    """[B, N, 4] `cxcywh` as fractions of the content."""
    valid: Tensor | None = None
    """[B, N] bool, which queries exist; None where all do."""
    overflow: Tensor | None = None
    """[B] int32, what the image asked for and a fixed capacity had no room for; None where nothing is limited."""


class Backbone(Protocol):
    """What training and deployment need of a backbone beside its forward pass."""

    channels: list[int]
    """Of the maps that it gives, fine to coarse."""
    train_statistics: bool
    """Whether its norms learn their running statistics."""
    own_layers: tuple[str, ...]
    """How the names of tensors begin that a classifier's file of weights does not have."""

    def norms(self) -> Iterator[nn.Module]:
        """Every batch norm."""

    def freeze(self) -> None:
        """Exclude from training what a backbone with published weights keeps."""

    def fold(self) -> None:
        """Fold every batch norm into the convolution before it, in place; for inference only, after loading weights."""


class Detector(nn.Module, ABC):
    """A detector. Images are [B, 3, H, W], normalized RGB, zero-padded at the bottom and right; `sizes` [B, 2] float32
    holds the (height, width) in pixels of each image's content.
    """

    config: Any
    """The family's, see :class:`asag.family.DetectorConfig`."""
    backbone: Any
    """A module that is a :class:`Backbone`."""
    neck: nn.Module
    """The convolutions after it; `nn.Identity` where there are none."""

    @abstractmethod
    def features(self, images: Tensor) -> list[Tensor]:
        """Images -> the maps that backbone and neck make of them; in float32 where autocast made them less."""

    @abstractmethod
    def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        """Names the stages that its family declares for its configuration."""

    @abstractmethod
    def deployed(self) -> Self:
        """A copy in evaluation mode without what only training needs, whose shapes do not depend on the data."""


def build_detector(config: DetectorConfig) -> Detector:
    """A detector with random weights, in evaluation mode. Raises ValueError for what is no configuration."""
    return family_of(config).build(config).eval()


Listener = Callable[[str, Mapping[str, Tensor]], None]
"""Called with a stage's name and its values by their names."""

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


def stage(name: str, **values: Tensor) -> tuple[Tensor, ...]:
    """Name values of the forward pass, in the order given; use what it returns further on.

    Costs nothing unless somebody listens or the model is being exported, where the names become those of the values in
    the file.
    """
    if torch.compiler.is_exporting():
        return tuple(torch.ops.asag.stage(value, f"{name}/{key}") for key, value in values.items())
    if not torch.compiler.is_compiling():
        for listener in _listeners.get():
            listener(name, values)
    return tuple(values.values())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of every stage that this thread runs inside the block."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextmanager
def recorded() -> Iterator[dict[str, Tensor]]:
    """The values of the stages that this thread runs inside the block, as `stage/name`."""
    found: dict[str, Tensor] = {}

    def keep(name: str, values: Mapping[str, Tensor]) -> None:
        found.update({f"{name}/{key}": value for key, value in values.items()})

    with listening(keep):
        yield found


@torch.library.custom_op("asag::stage", mutates_args=())
def _stage(value: Tensor, name: str) -> Tensor:
    """A value that the exported file calls `name`; the exporter removes the op."""
    return value.clone()


@_stage.register_fake
def _(value: Tensor, name: str) -> Tensor:
    return torch.empty_like(value)
