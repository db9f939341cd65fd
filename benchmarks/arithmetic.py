"""Multiply-adds of the presets' forward pass: `python -m benchmarks.arithmetic --preset NAME --data FOLDER`.

The mean over the images of a dataset, each at the size that the method gives it, without padding. Papers on detectors
call this GFLOPs, though a multiply-add is two operations. Nothing is computed, so it takes seconds.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from asag.families import NamedPreset, find_preset
from asag.runtime.coco_dataset import open_coco
from asag.runtime.preprocessing import resized_size

ROWS_OF_COCO = 91
"""Classes of those who number them by COCO's ids, as most authors count them."""


class _UncountedOps(TorchDispatchMode):
    """Notes the ops of this project, whose arithmetic no counter of PyTorch knows."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, op: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if op.namespace == "asag":
            self.names.add(str(op))
        return op(*args, **(kwargs or {}))


def multiply_adds(preset: NamedPreset, sizes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """Of one image of each of the sizes (height, width).

    Raises ValueError for a detector with ops that are not counted.
    """
    with torch.device("meta"):
        detector = preset.family.build(dataclasses.replace(preset.config, num_classes=ROWS_OF_COCO)).eval()
    found = {}
    for height, width in sizes:
        noticed = _UncountedOps()
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter, noticed:
            detector(torch.zeros(1, 3, height, width), torch.tensor([[float(height), float(width)]]))
        if noticed.names:
            told = f"{preset.name} has {min(noticed.names)}, which this does not count"
            raise ValueError(f"{told}; see `asag bench --limit`")
        found[height, width] = counter.get_total_flops() / 2
    return found


def mean_of_dataset(preset: NamedPreset, sizes: Sequence[tuple[int, int]]) -> float:
    """Multiply-adds of an image on average; sizes: (height, width) of the stored images."""
    resized = Counter(resized_size(*size, preset.input.shorter_side, preset.input.longer_side) for size in sizes)
    counts = multiply_adds(preset, resized)
    return sum(counts[size] * times for size, times in resized.items()) / resized.total()


@click.command()
@click.option("--preset", "presets", multiple=True, required=True, help="One or several.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Dataset with the images' sizes.")
@click.option("--split", default="val2017", show_default=True)
def main(presets: tuple[str, ...], data: Path, split: str) -> None:
    """Print the multiply-adds of presets, on average over a dataset's images."""
    console = Console()
    images = open_coco(data, split).images.values()
    for name in presets:
        mean = mean_of_dataset(find_preset(name), [(image.height, image.width) for image in images])
        console.print(f"{name}: {mean / 1e9:.1f} GMAC an image, {len(images)} images", highlight=False)


if __name__ == "__main__":
    main()
