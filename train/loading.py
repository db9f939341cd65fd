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

from asag.train.dataset import DetectionDataset
from asag.train.transforms import Batch, Sample, TrainingTransform, collate
from asag.training.randomness import AUGMENTATION, ORDER, Place, numpy_generator


class AugmentedDataset(Dataset[Sample]):
    """Augmented samples by (epoch, index)."""

    def __init__(self, dataset: DetectionDataset, transform: TrainingTransform, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place) -> Sample:
        epoch, index = place
        return self.transform(*self.dataset[index], numpy_generator(self.seed, AUGMENTATION, epoch, index))


class StepSampler(Sampler[list[Place]]):
    """The pieces of the steps ``first_step`` to ``steps`` - 1, through as many epochs as that takes.

    Every epoch is a fresh permutation of all images; those that do not fill a last batch are left out of that epoch. A
    dataset smaller than a batch makes one batch per epoch. A step's batch is cut into ``accumulate`` times ``count``
    pieces of almost equal length, and this process, number ``rank`` of ``count``, gets ``accumulate`` of them. So a
    step trains on the same images however it is cut. Raises ValueError when there are more pieces than images.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        steps: int,
        seed: int,
        first_step: int = 0,
        *,
        accumulate: int = 1,
        rank: int = 0,
        count: int = 1,
    ) -> None:
        self.images, self.steps, self.seed, self.first_step = images, steps, seed, first_step
        self.batch_size = min(batch_size, images)
        self.steps_per_epoch = steps_per_epoch(images, batch_size)
        self.accumulate, self.rank, self.count = accumulate, rank, count
        if self.batch_size < accumulate * count:
            raise ValueError(
                f"a step of {self.batch_size} images cannot be cut into {count} processes times {accumulate} pieces:"
                " raise batch_size (it counts the images of all processes together)"
            )

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[Place]]:
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.first_step, self.steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = numpy_generator(self.seed, ORDER, epoch).permutation(self.images), epoch
            start = position * self.batch_size
            pieces = np.array_split(order[start : start + self.batch_size], self.accumulate * self.count)
            for piece in pieces[self.rank :: self.count]:
                yield [(epoch, int(index)) for index in piece]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Steps of one pass over the images; at least 1."""
    return max(1, images // batch_size)


def make_loader(
    dataset: DetectionDataset,
    transform: TrainingTransform,
    sampler: StepSampler,
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """A loader of the sampler's batches, in order, read by `workers` processes (0: by this one)."""
    samples: Dataset[Any] = AugmentedDataset(dataset, transform, sampler.seed)
    return DataLoader(
        samples,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        # The loader draws a number from its generator; one of its own leaves the training's random state alone.
        generator=torch.Generator().manual_seed(sampler.seed),
    )
