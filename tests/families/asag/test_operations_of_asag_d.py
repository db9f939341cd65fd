"""How much ASAG-D computes, against what its paper reports (supplement: 182 GFLOPs)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import asag.ops  # noqa: F401 (registers `torch.ops.asag`)
from asag import find_preset
from asag.detector import build_detector
from asag.trt_plugins.operations import OPERATIONS

INPUT = (800, 1120)
"""An image of COCO on average: sides of 4 to 3 and 3 to 2 are about as frequent, the shorter one becomes 800."""


def attended(*given: Sequence[int], out_shape: Sequence[int]) -> float:
    """Operations of the op that PyTorch cannot count, of the shapes of its tensors."""
    return OPERATIONS["MultiScaleDeformableAttention"].work(given[:3], {}).operations


def multiply_adds(preset: str) -> float:
    """10^9 multiply-adds for one image that fills the input. Nothing is computed: there are shapes only."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.asag.deformable_attention: attended})
    with torch.device("meta"), counter:
        detector = build_detector(find_preset(preset).config).deployed()
        detector(torch.zeros(1, 3, *INPUT), torch.zeros(1, 2))
    return counter.get_total_flops() / 2e9


def test_gflops() -> None:
    """The counter has the number that Deformable DETR's repository reports, and so that of ASAG-D means something."""
    assert multiply_adds("deformable-detr-r50") == pytest.approx(172.9, rel=0.01)
    assert multiply_adds("asag-d-r50-3x-300") == pytest.approx(182, rel=0.05)
