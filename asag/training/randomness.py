"""Random draws that follow from the seed, the epoch and the image alone.

So neither the number of processes, nor how a step is cut into pieces, nor where a run was interrupted changes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Place = tuple[int, int]
"""Epoch and index of an image."""

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One source of random numbers for a whole batch, one for each of its images, or torch's global one."""

# What a random stream is for, so that streams of equal seed and epoch do not coincide.
AUGMENTATION, ORDER, PATCHES = 1, 2, 3


def numpy_generator(seed: int, purpose: int, *place: int) -> np.random.Generator:
    """The generator of one purpose at one place."""
    return np.random.default_rng([seed, purpose, *place])


def image_generators(seed: int, places: Sequence[Place]) -> list[torch.Generator]:
    """A generator on the CPU for each image of a batch, for its training-time patches and noise."""
    generators = []
    for place in places:
        state = np.random.SeedSequence([seed, PATCHES, *place]).generate_state(1, np.uint64)
        generators.append(torch.Generator().manual_seed(int(state[0])))
    return generators


def generator_of(generators: Generators, image: int) -> torch.Generator | None:
    """The generator of one image of a batch."""
    return generators[image] if isinstance(generators, Sequence) else generators
