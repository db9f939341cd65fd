"""Pixels to what the detector takes; training and the deployed model do the same arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""Normalization of RGB values in 0..1, per channel."""


class ImageNormalization(nn.Module):
    """uint8 RGB to float32: scaled to 0..1, minus the mean, over the standard deviation, zero outside the content."""

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Of pixels from 0 to 255, so that an image takes one subtraction and one product.
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).reshape(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("scale", 1 / (torch.tensor(IMAGE_STD).reshape(1, 3, 1, 1) * 255), persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """images: [B, 3, H, W] uint8, content top-left; sizes: [B, 2] (height, width) of the content in pixels.

        Returns float32 [B, 3, H, W].
        """
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device).reshape(1, 1, -1, 1) < sizes[:, 0].reshape(-1, 1, 1, 1)
        columns = torch.arange(width, device=images.device).reshape(1, 1, 1, -1) < sizes[:, 1].reshape(-1, 1, 1, 1)
        return torch.where(rows & columns, (images.float() - self.mean) * self.scale, 0.0)
