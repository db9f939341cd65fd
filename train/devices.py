"""The device that a process trains on."""

from __future__ import annotations

import torch

from asag.train.processes import Processes


def resolve_device(name: str) -> torch.device:
    """The torch device called `name`, with ``auto`` for a GPU where there is one. ValueError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: choose auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} asked for, but torch sees no GPU: choose cpu")
    return device


def check_gpus(device: torch.device, processes: Processes) -> None:
    """Check that each process on this machine has a GPU of its own where `device` is one. Raises ValueError."""
    if device.type != "cuda" or not processes.several:
        return
    if device.index is not None:
        raise ValueError(f"device {device} is one GPU for {processes.count} processes: choose cuda, each takes its own")
    gpus = torch.cuda.device_count()
    if processes.local_count > gpus:
        raise ValueError(
            f"{processes.local_count} processes on a machine where torch sees {gpus} GPUs: start one for each"
            f" (torchrun --nproc-per-node {gpus})"
        )
