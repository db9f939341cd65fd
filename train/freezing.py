"""Keeping named parts of a detector as they are while the rest trains."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from asag.detector import Detector

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def freeze_parts(detector: Detector, parts: Sequence[str]) -> None:
    """Exclude parts from training, in place: their parameters, and the running statistics of their batch norms.

    A part is a module's name, such as `backbone` or `backbone.layer2`, or a parameter's. Call it after every switch to
    training. Raises ValueError, with the names of the largest parts, for a name that has no parameters.
    """
    for part in parts:
        parameters = [parameter for name, parameter in detector.named_parameters() if _within(name, part)]
        if not parameters:
            names = dict.fromkeys(name.partition(".")[0] for name, _ in detector.named_parameters())
            raise ValueError(
                f"freeze: the detector has no part {part!r} that could train; its parts are {', '.join(names)}, and"
                " theirs, such as backbone.layer1"
            )
        for parameter in parameters:
            parameter.requires_grad_(False)
        for name, module in detector.named_modules():
            if _within(name, part) and isinstance(module, _NORMS):
                module.eval()


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
