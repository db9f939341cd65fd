"""Two checks of one model that need no reference: copies in a batch, and batches of every size.

Engines of detectors with queries have failed both without an error: rows of a batch of identical images that differ,
and results that depend on how many images run together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from asag.runtime.parity.agreement import BOX_TOLERANCE, SCORE_TOLERANCE, compare_detections
from asag.runtime.postprocessing import Detections, postprocess
from asag.runtime.preprocessing import ImageLike, as_image, prepare
from asag.runtime.records import to_json
from asag.runtime.session import Session

BATCH_SIZES = (1, 2, 4)
"""Batch sizes that are tried, as far as the model takes them."""

REDUCED_SCORE_TOLERANCE = 1e-2
REDUCED_BOX_TOLERANCE = 1.0
"""Pixels. A float16 kernel may add in another order for another batch; a detector that breaks is off by far more."""


@dataclasses.dataclass(frozen=True)
class BatchCheck:
    """One batch size of one model: do the results depend on it?

    ``kind`` is "copies" (the same image ``batch`` times gives the same result in every place) or "batch size" (images
    run ``batch`` at a time give what they give alone). ``compared`` pairs of results were compared; ``differing`` names
    those that differ by more than the tolerances: places of the batch for copies, numbers of the images else.
    The largest differences are over matched detections; ``unmatched`` counts the others, apart from ties, and
    ``not_finite`` the numbers in the outputs that are none. ``reason`` is set where the check could not run.
    """

    name: str
    backend: str
    precision: str
    kind: str
    batch: int
    compared: int = 0
    differing: tuple[int, ...] = ()
    score_difference: float = 0.0
    box_difference: float = 0.0
    unmatched: int = 0
    not_finite: int = 0
    reason: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether nothing differs; a check that could not run has no say."""
        return not self.differing and self.not_finite == 0

    def sentence(self) -> str:
        """What was found, in one line."""
        model = f"{self.name} ({self.backend} {self.precision})"
        what = f"{self.batch} copies in a batch" if self.kind == "copies" else f"batches of {self.batch}"
        if self.reason is not None:
            return f"{model}, {what}: not checked, {self.reason}"
        expected = "each other" if self.kind == "copies" else "batch 1"
        if self.agrees:
            return f"{model}, {what}: same as {expected}"
        if self.not_finite:
            return f"{model}, {what}: {self.not_finite} outputs are not finite numbers"
        place = "place" if self.kind == "copies" else "image"
        numbers = ", ".join(map(str, self.differing[:5])) + (", ..." if len(self.differing) > 5 else "")
        return (
            f"{model}, {what}: differs from {expected} at {place} {numbers}, by {self.score_difference:.1e} in score"
            f" and {self.box_difference:.1e} pixels, {self.unmatched} unmatched"
        )

    def to_json(self) -> dict[str, Any]:
        """The check as JSON values."""
        return {**to_json(self), "agrees": self.agrees}


def check_batches(
    session: Session,
    images: Sequence[ImageLike],
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> tuple[BatchCheck, ...]:
    """Run both checks on up to as many ``images`` as the largest batch holds.

    Sizes that the model does not take are left out; one that takes a single image gets one row that says so. The
    tolerances are those of parity for float32 and looser ones for less; boxes in pixels of the original image. Raises
    ValueError without an image or for a batch size under 1.
    """
    sizes = sorted(set(batch_sizes) - {1})
    if not images or any(size < 1 for size in batch_sizes):
        raise ValueError("checking batches needs at least one image and batch sizes of at least 1")
    exact = session.precision == "fp32"
    tolerances = (SCORE_TOLERANCE, BOX_TOLERANCE) if exact else (REDUCED_SCORE_TOLERANCE, REDUCED_BOX_TOLERANCE)
    if not sizes:
        return ()
    taken = [size for size in sizes if session.max_batch is None or size <= session.max_batch]
    if not taken:
        reason = f"it takes at most {session.max_batch} image at once"
        return (BatchCheck(session.name, session.backend, session.precision, "copies", sizes[0], reason=reason),)
    loaded = [as_image(image) for image in images[: max(taken)]]
    alone = [_run(session, [image])[0][0] for image in loaded]
    checks = []
    for size in taken:
        found, not_finite = _run(session, [loaded[0]] * size)
        pairs = [(place, found[0], found[place]) for place in range(1, size)]
        checks.append(_judge(session, "copies", size, pairs, not_finite, tolerances))
        order = [index % len(loaded) for index in range(-(-len(loaded) // size) * size)]  # every batch is full
        pairs, not_finite = [], 0
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            found, wrong = _run(session, [loaded[index] for index in batch])
            pairs += [(index, alone[index], detections) for index, detections in zip(batch, found, strict=True)]
            not_finite += wrong
        checks.append(_judge(session, "batch size", size, pairs, not_finite, tolerances))
    return tuple(checks)


def _run(session: Session, batch: Sequence[Image.Image]) -> tuple[list[Detections], int]:
    """Detections of a batch, and how many of the model's numbers are not finite, which post-processing leaves out."""
    outputs = session.run(prepare(batch, session.metadata))
    not_finite = sum(int((~np.isfinite(outputs[name])).sum()) for name in ("boxes", "scores"))
    return postprocess(outputs, [(image.height, image.width) for image in batch], session.metadata), not_finite


def _judge(
    session: Session,
    kind: str,
    batch: int,
    pairs: Sequence[tuple[int, Detections, Detections]],
    not_finite: int,
    tolerances: tuple[float, float],
) -> BatchCheck:
    suppressed, limit = session.metadata.nms_iou is not None, session.metadata.max_detections
    compared = [
        compare_detections(
            number,
            expected,
            found,
            limit,
            suppressed=suppressed,
            score_tolerance=tolerances[0],
            box_tolerance=tolerances[1],
        )
        for number, expected, found in pairs
    ]
    return BatchCheck(
        name=session.name,
        backend=session.backend,
        precision=session.precision,
        kind=kind,
        batch=batch,
        compared=len(compared),
        differing=tuple(
            sorted({number for (number, *_), pair in zip(pairs, compared, strict=True) if not pair.within(*tolerances)})
        ),
        score_difference=max((pair.score_difference for pair in compared), default=0.0),
        box_difference=max((pair.box_difference for pair in compared), default=0.0),
        unmatched=sum(pair.unmatched_reference + pair.unmatched_candidate for pair in compared),
        not_finite=not_finite,
    )
