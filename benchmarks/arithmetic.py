"""Multiply-adds of the presets' forward pass: `python -m benchmarks.arithmetic --preset NAME --data FOLDER`.

The mean over the images of a dataset, each at the size that the method gives it, without padding. Papers on detectors
call this GFLOPs, though a multiply-add is two operations. Nothing is computed, so it takes seconds.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import asag.ops  # noqa: F401 (registers `torch.ops.asag`)
from asag.families import NamedPreset, find_preset
from asag.runtime.coco_dataset import open_coco
from asag.runtime.preprocessing import resized_size
from asag.trt_plugins.operations import OPERATIONS, Operation

ROWS_OF_COCO = 91
"""Classes of those who number them by COCO's ids, as most authors count them."""


def _counted(operation: Operation) -> Callable[..., float]:
    """The arithmetic of a custom op as PyTorch's counter asks for it: of its tensors' shapes, and its attributes."""

    def count(*given: Any, out_shape: Any) -> float:
        tensors = len(operation.inputs)
        names = [name for name, _ in operation.attributes]
        return operation.work(given[:tensors], dict(zip(names, given[tensors:], strict=True))).operations

    return count


def multiply_adds(preset: NamedPreset, sizes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """Of one image of each of the sizes (height, width)."""
    counts = {getattr(torch.ops.asag, one.snake_name): _counted(one) for one in OPERATIONS.values()}
    with torch.device("meta"):
        detector = preset.family.build(dataclasses.replace(preset.config, num_classes=ROWS_OF_COCO)).deployed()
    found = {}
    for height, width in sizes:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counts) as counter:
            detector(torch.zeros(1, 3, height, width), torch.tensor([[float(height), float(width)]]))
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
