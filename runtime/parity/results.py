"""What a parity run found: a row for each backend, and how far each agrees with the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from asag.runtime.coco_evaluation import CocoResult
from asag.runtime.coco_file import Id
from asag.runtime.machine import Machine
from asag.runtime.metadata import ModelMetadata
from asag.runtime.parity.batch_checks import BatchCheck
from asag.runtime.parity.bootstrap import Interval
from asag.runtime.parity.stage_comparison import StageReport
from asag.runtime.postprocessing import Detections
from asag.runtime.records import NULL_IS_INFINITE, NULL_IS_NAN, to_json

SCORE_BINS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Upper ends of the bins of score differences; the last bin has none."""

AP_NAMES = ("ap", "ap50", "ap75", "aps", "apm", "apl")


@dataclasses.dataclass(frozen=True)
class Unavailable:
    """A candidate that cannot run here, and why; it becomes a row of the table."""

    name: str
    backend: str
    precision: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement with the reference over all images.

    ``images`` were compared, ``images_within`` agree within the tolerances apart from ties. The largest differences
    are over matched pairs: scores, and boxes in pixels of the original images. ``share_iou_99`` and ``share_iou_90``
    are the shares of detections, apart from ties at the cut, whose partner overlaps them with at least that IoU.
    ``score_quantiles`` are those of the score differences at 0.5, 0.9, 0.99 and 1; ``score_histogram`` counts the
    differences up to each of ``SCORE_BINS``, and in the end those above.
    """

    images: int
    images_within: int
    matched: int
    unmatched: int
    cut_ties: int
    swaps: int
    score_difference: float
    box_difference: float
    worst_images: tuple[Id, ...]
    share_iou_99: float = 1.0
    share_iou_90: float = 1.0
    score_quantiles: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    score_histogram: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class ParityRow:
    """One backend's results; ``reason`` is set, and the rest None, where it could not run.

    Latencies are milliseconds of one image from decoded pixels to detections. ``differences`` are those of AP, AP50,
    AP75 and of the sizes to the reference. The intervals are 95 % bootstrap intervals over images of AP and of its
    difference, whose samples are the same for every backend. ``agreement`` and the differences are None for the
    reference. Raises ValueError for a row with neither a result nor a reason, or with both.
    """

    name: str
    backend: str
    precision: str
    result: CocoResult | None = None
    ap_difference: float | None = None
    agreement: Agreement | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    overflow: int | None = None
    reason: str | None = None
    differences: Mapping[str, float] | None = None
    ap_interval: Interval | None = None
    ap_difference_interval: Interval | None = None

    def __post_init__(self) -> None:
        if (self.result is None) == (self.reason is None):
            raise ValueError("a row has either a result or the reason why there is none")
        if (self.agreement is None) != (self.differences is None):
            raise ValueError("a row has agreement and differences, or neither")


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """Rows (the reference first), and per row the detections by image id (None where it could not run).

    ``batch_checks`` say of every model that ran whether its results depend on the batch, ``stages`` of exported files
    where differences start.
    """

    dataset: str
    image_ids: tuple[Id, ...]
    rows: Annotated[tuple[ParityRow, ...], NULL_IS_NAN]
    detections: tuple[Mapping[Id, Detections] | None, ...]
    metadata: ModelMetadata
    machine: Machine
    score_tolerance: float
    box_tolerance: float
    batch_checks: Annotated[tuple[BatchCheck, ...], NULL_IS_NAN]
    stages: Annotated[tuple[StageReport, ...], NULL_IS_INFINITE]

    @property
    def batches_agree(self) -> bool:
        """Whether no model's results depend on what else is in the batch, or on its size."""
        return all(check.agrees for check in self.batch_checks)

    @property
    def agrees(self) -> bool:
        """Whether every backend that ran has the reference's AP to three decimals and its detections on every image.

        Detections are the same within the tolerances apart from ties. A backend that could not run has no say, and
        neither has the AP of images without objects, which is not a number.
        """
        return all(
            row.agreement.images_within == row.agreement.images and not abs(row.ap_difference or 0.0) >= 5e-4
            for row in self.rows
            if row.agreement is not None
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the detections, as JSON values."""
        return {
            "dataset": self.dataset,
            "images": len(self.image_ids),
            "score_tolerance": self.score_tolerance,
            "box_tolerance": self.box_tolerance,
            "score_bins": SCORE_BINS,
            "rows": to_json(self.rows),
            "batch_checks": [check.to_json() for check in self.batch_checks],
            "stages": [stage.to_json() for stage in self.stages],
            "machine": self.machine.to_json(),
        }
