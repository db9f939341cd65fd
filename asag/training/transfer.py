"""Moving small tensors to the device that trains without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`; one that comes from the CPU is queued behind the device's work instead of awaiting it.

    A GPU reads pinned memory on its own; PyTorch keeps that memory until it has.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
