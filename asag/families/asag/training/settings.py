"""What only ASAG's training has, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ASAGSettings:
    """Fields of a training configuration beside those of every family."""

    first_epoch: int = 0
    """Number that the first epoch counts as. Epoch 0 takes its patches from ground truth; trained weights need 1."""
    denoising_scale: float | None = None
    """How far noised queries are moved, as a share of the object; None trains without them."""
    denoising_fall: float = 0.0
    """What the scale loses every epoch."""

    def __post_init__(self) -> None:
        if self.first_epoch < 0:
            raise ValueError(f"first_epoch is {self.first_epoch}; it must be at least 0")
        if self.denoising_scale is not None and not self.denoising_scale > 0:
            raise ValueError(f"denoising_scale is {self.denoising_scale}; it must be above 0")
        if not 0 <= self.denoising_fall <= 1:
            raise ValueError(f"denoising_fall is {self.denoising_fall}; it must be between 0 and 1")
