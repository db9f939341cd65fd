"""The order of training images and the loader that reads them.

Order and augmentation of every image follow from the seed, the epoch and the image alone, so a run that starts at step
n reads exactly what an uninterrupted run reads from step n on, with any number of worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from train.dataset import DetectionDataset
from train.transforms import Batch, Sample, TrainingTransform, collate

Place = tuple[int, int]
"""Epoch and index of an image."""

# What a random stream is for, so that streams of equal seed and epoch do not coincide.
_AUGMENTATION, _ORDER = 1, 2


class AugmentedDataset(Dataset[Sample]):
    """Augmented samples by (epoch, index)."""

    def __init__(self, dataset: DetectionDataset, transform: TrainingTransform, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place) -> Sample:
        epoch, index = place
        generator = np.random.default_rng([self.seed, _AUGMENTATION, epoch, index])
        return self.transform(*self.dataset[index], generator)


class StepSampler(Sampler[list[Place]]):
    """Batches of places for the steps ``first_step`` to ``steps`` - 1, through as many epochs as that takes.

    Every epoch is a fresh permutation; the images that do not fill a last batch are left out of that epoch. A dataset
    smaller than a batch makes one batch per epoch.
    """

    def __init__(self, images: int, batch_size: int, steps: int, seed: int, first_step: int = 0) -> None:
        self.images, self.steps, self.seed, self.first_step = images, steps, seed, first_step
        self.batch_size = min(batch_size, images)
        self.steps_per_epoch = steps_per_epoch(images, batch_size)

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step)

    def __iter__(self) -> Iterator[list[Place]]:
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.first_step, self.steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(self.images), epoch
            start = position * self.batch_size
            yield [(epoch, int(index)) for index in order[start : start + self.batch_size]]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Steps of one pass over the images; at least 1."""
    return max(1, images // batch_size)


def make_loader(
    dataset: DetectionDataset,
    transform: TrainingTransform,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    first_step: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """A loader of the batches of the steps ``first_step`` to ``steps`` - 1, in order."""
    samples: Dataset[Any] = AugmentedDataset(dataset, transform, seed)
    return DataLoader(
        samples,
        batch_sampler=StepSampler(len(dataset), batch_size, steps, seed, first_step),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        # The loader draws a number from its generator; one of its own leaves the training's random state alone.
        generator=torch.Generator().manual_seed(seed),
    )
