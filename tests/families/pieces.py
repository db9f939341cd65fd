"""A step that is cut into pieces, for tests of any family's training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from asag.training.protocol import Batch, Step, Training


def check_pieces_add_up(training: Training, batch: Batch) -> None:
    """The losses of a batch of two images are the sum of its images', with the divisors of the whole step."""
    pieces = [Batch(batch.images[i : i + 1], batch.sizes[i : i + 1], batch.targets[i : i + 1]) for i in range(2)]
    totals = torch.stack([training.counts(piece, Step(0)) for piece in pieces]).sum(0)
    assert torch.equal(totals, training.counts(batch, Step(0)))

    def losses(part: Batch) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return training.losses(training.outputs(part, Step(0)), part.targets, totals)

    whole, parts = losses(batch), [losses(piece) for piece in pieces]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-4, atol=1e-5)
