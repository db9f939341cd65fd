"""Budgets: how much a candidate may differ from its reference before a check fails."""

from __future__ import annotations

import dataclasses
import math

from asag.runtime.parity.comparison import ParityReport, ParityRow


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Limits for every candidate; None sets none.

    ``ap_drop`` is in AP (0..1), ``score_difference`` and ``box_difference`` (pixels of the original images) bound the
    largest over matched detections, ``unmatched`` counts detections without a partner over all images, and
    ``share_iou_90`` is the least share of detections whose partner overlaps with an IoU of 0.9. ``latency_ratio``
    bounds the median latency over the reference's.
    """

    ap_drop: float | None = None
    score_difference: float | None = None
    box_difference: float | None = None
    unmatched: int | None = None
    share_iou_90: float | None = None
    latency_ratio: float | None = None

    @property
    def any(self) -> bool:
        """Whether there is a limit at all."""
        return any(value is not None for value in dataclasses.astuple(self))


def over_budget(report: ParityReport, budgets: Budgets) -> list[str]:
    """A line for every limit that a candidate breaks, naming both numbers; empty when all hold.

    A candidate that did not run breaks every limit, and an AP that is not a number the limit of the drop.
    """
    if not budgets.any:
        return []
    lines = []
    for row in report.rows[1:]:
        model = f"{row.name} ({row.backend} {row.precision})"
        if row.agreement is None:
            lines.append(f"{model}: not run, so no budget is kept: {row.reason}")
            continue
        for what, value, limit in _measured(report.rows[0], row, budgets):
            if not value <= limit:
                lines.append(f"{model}: {what} {value:.4g}, the budget is {limit:g}")
        least, share = budgets.share_iou_90, row.agreement.share_iou_90
        if least is not None and share < least:
            lines.append(f"{model}: share of detections with IoU 0.9 {share:.4f}, the budget is at least {least:g}")
    return lines


def _measured(reference: ParityRow, row: ParityRow, budgets: Budgets) -> list[tuple[str, float, float]]:
    """What has an upper limit: name, value, limit."""
    assert row.agreement is not None
    assert row.ap_difference is not None
    assert reference.result is not None
    ratio = math.nan
    if row.latency_p50_ms and reference.latency_p50_ms:
        ratio = row.latency_p50_ms / reference.latency_p50_ms
    found: list[tuple[str, float, float | None]] = [
        ("AP drop", -row.ap_difference, budgets.ap_drop),
        ("largest score difference", row.agreement.score_difference, budgets.score_difference),
        ("largest box difference in pixels", row.agreement.box_difference, budgets.box_difference),
        ("unmatched detections", row.agreement.unmatched, budgets.unmatched),
        ("latency over the reference's", ratio, budgets.latency_ratio),
    ]
    return [(what, value, limit) for what, value, limit in found if limit is not None]
