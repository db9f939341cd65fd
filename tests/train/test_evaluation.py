"""Evaluation of a detector in memory, alone and shared out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from asag.checkpoint import CheckpointInfo
from asag.detector import build_detector
from asag.families import find_preset
from asag.runtime.coco_dataset import open_coco
from asag.train.evaluation import Evaluation, evaluate_detector
from asag.train.processes import Processes


@dataclass(frozen=True)
class Share(Processes):
    """A process whose `gather` finds what the others are said to have given."""

    others: tuple[Any, ...] = ()

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


def test_the_shares_of_all_processes_are_the_whole(micro_preset: str, shapes: Path) -> None:
    validation = open_coco(shapes)
    preset = find_preset(micro_preset)
    info = CheckpointInfo.of(preset, dict(zip(validation.category_ids, validation.category_names, strict=True)))
    detector = build_detector(dataclasses.replace(preset.config, num_classes=len(validation.category_ids)))
    whole = evaluate_detector(detector, info, validation)
    assert isinstance(whole, Evaluation)
    assert whole.coco.images == len(validation) == 3

    gathered: list[Any] = []

    class Worker(Share):
        def gather(self, value: Any) -> list[Any]:
            gathered.append(value)
            return super().gather(value)

    # More processes than images: the last one has nothing to detect on.
    for rank in (1, 2, 3):
        assert evaluate_detector(detector, info, validation, processes=Worker(rank=rank, count=4)) is None
    assert [len(part) for part in gathered] == [1, 1, 0]
    shared = evaluate_detector(detector, info, validation, processes=Share(count=4, others=tuple(gathered)))
    assert isinstance(shared, Evaluation)
    assert shared.values() == pytest.approx(whole.values(), abs=0, nan_ok=True)
