"""Comparing backends with a reference: accuracy, agreement image by image, latency."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from runtime.agreement import BOX_TOLERANCE, SCORE_TOLERANCE, ImageAgreement, compare_detections
from runtime.benchmark import milliseconds
from runtime.coco_evaluation import CocoFolder, CocoResult, evaluate
from runtime.errors import BackendUnavailableError, one_line
from runtime.machine import Machine, describe_machine
from runtime.metadata import ModelMetadata
from runtime.postprocessing import Detections
from runtime.session import Session, Variant, open_session

HEADINGS = (
    "model",
    "backend",
    "precision",
    "AP",
    "AP difference",
    "largest score difference",
    "largest box difference, px",
    "unmatched",
    "ties",
    "p50 ms",
    "p95 ms",
)
_SHORT_HEADINGS = (
    "backend",
    "prec.",
    "AP",
    "AP\ndiff",
    "score\ndiff",
    "box\ndiff px",
    "un-\nmatched",
    "ties",
    "p50\nms",
    "p95\nms",
)


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
    are over matched pairs: scores, and boxes in pixels of the original images.
    """

    images: int
    images_within: int
    matched: int
    unmatched: int
    cut_ties: int
    swaps: int
    score_difference: float
    box_difference: float
    worst_images: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ParityRow:
    """One backend's results; ``reason`` is set, and the rest None, where it could not run.

    Latencies are milliseconds of one image from decoded pixels to detections. ``agreement`` is None for the reference.
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


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """Rows (the reference first), and per row the detections by image id (None where it could not run)."""

    dataset: str
    image_ids: tuple[int, ...]
    rows: tuple[ParityRow, ...]
    detections: tuple[Mapping[int, Detections] | None, ...]
    metadata: ModelMetadata
    machine: Machine
    score_tolerance: float = SCORE_TOLERANCE
    box_tolerance: float = BOX_TOLERANCE

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
        rows = []
        for row in self.rows:
            values = dataclasses.asdict(row)
            values["result"] = None if row.result is None else row.result.to_json()
            rows.append({name: _json_number(value) for name, value in values.items()})
        return {
            "dataset": self.dataset,
            "images": len(self.image_ids),
            "score_tolerance": self.score_tolerance,
            "box_tolerance": self.box_tolerance,
            "rows": rows,
            "machine": self.machine.to_json(),
        }


def open_candidate(path: str | os.PathLike[str], **options: Any) -> Session | Unavailable:
    """:func:`runtime.session.open_session`, with an unavailable backend as a row for the table instead of an error."""
    try:
        return open_session(path, **options)
    except BackendUnavailableError as error:
        name = Path(path).name
        backend, precision = _backend_of(Path(path), str(options.get("device", "cpu")))
        return Unavailable(name, backend, precision, one_line(error))


def open_reference(
    path: str | os.PathLike[str], candidates: Sequence[Session | Unavailable], **options: Any
) -> Session:
    """:func:`runtime.session.open_session` of the reference; a checkpoint is deployed as the first candidate that runs
    here was exported (input size, head, levels, patch capacity), so that a file exported with options is compared with
    the same model.
    """
    sessions = [candidate for candidate in candidates if isinstance(candidate, Session)]
    if Path(path).suffix.lower() == ".safetensors" and sessions:
        options |= dataclasses.asdict(Variant.of(sessions[0].metadata))
    return open_session(path, **options)


def compare(
    reference: Session,
    candidates: Sequence[Session | Unavailable],
    dataset: CocoFolder,
    images: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Run every backend on the dataset's first ``images`` images (None: all), one at a time, in turn.

    Each image is read once and given to all, so that their latencies see the same conditions. ``progress`` gets
    (images done, all). Raises ValueError when a candidate prepares images otherwise than the reference, or has other
    classes than the dataset.
    """
    if images is not None and images < 1:
        raise ValueError(f"the number of images must be at least 1, it is {images}")
    image_ids = dataset.image_ids[:images]
    if not image_ids:
        raise ValueError(f"{dataset.annotations_path} holds no images")
    sessions = [reference, *(candidate for candidate in candidates if isinstance(candidate, Session))]
    for session in sessions:
        dataset.check_categories(session.metadata)
        _check_same_task(reference, session)
    detections: list[dict[int, Detections]] = [{} for _ in sessions]
    seconds: list[list[float]] = [[] for _ in sessions]
    for number, image_id in enumerate(image_ids):
        image = dataset.load(image_id)
        if number == 0:
            for session in sessions:  # the first run of a backend allocates and tunes; it is no latency
                session.detect([image])
        for index in _turn(len(sessions), number):
            detections[index][image_id], elapsed = _timed(sessions[index], image)
            seconds[index].append(elapsed)
        if progress is not None:
            progress(number + 1, len(image_ids))
    rows = _rows(sessions, dataset, detections, seconds)
    all_rows, all_detections = _with_unavailable(candidates, rows, detections)
    return ParityReport(
        dataset=str(dataset.annotations_path),
        image_ids=image_ids,
        rows=all_rows,
        detections=all_detections,
        metadata=reference.metadata,
        machine=describe_machine(),
    )


def _turn(count: int, number: int) -> list[int]:
    """The order of the backends for an image; it rotates, so that none always follows the same one."""
    return [(number + offset) % count for offset in range(count)]


def _timed(session: Session, image: Image.Image) -> tuple[Detections, float]:
    started = time.perf_counter()
    (found,) = session.detect([image])
    return found, time.perf_counter() - started


def _rows(
    sessions: Sequence[Session],
    dataset: CocoFolder,
    detections: Sequence[Mapping[int, Detections]],
    seconds: Sequence[Sequence[float]],
) -> list[ParityRow]:
    reference_result = evaluate(dataset, detections[0])
    rows = []
    for index, session in enumerate(sessions):
        result = reference_result if index == 0 else evaluate(dataset, detections[index])
        p50, p95 = (float(value) for value in np.percentile(np.array(seconds[index]) * 1e3, [50, 95]))
        rows.append(
            ParityRow(
                name=session.name,
                backend=session.backend,
                precision=session.precision,
                result=result,
                ap_difference=None if index == 0 else result.ap - reference_result.ap,
                agreement=None if index == 0 else _agreement(session, detections[0], detections[index]),
                latency_p50_ms=p50,
                latency_p95_ms=p95,
                overflow=sum(found.overflow for found in detections[index].values()),
            )
        )
    return rows


def _agreement(session: Session, reference: Mapping[int, Detections], candidate: Mapping[int, Detections]) -> Agreement:
    limit, suppressed = session.metadata.max_detections, session.metadata.nms_iou is not None
    images = [
        compare_detections(image_id, reference[image_id], candidate[image_id], limit, suppressed=suppressed)
        for image_id in reference
    ]
    return Agreement(
        images=len(images),
        images_within=sum(image.within() for image in images),
        matched=sum(image.matched for image in images),
        unmatched=sum(image.unmatched_reference + image.unmatched_candidate for image in images),
        cut_ties=sum(image.cut_ties for image in images),
        swaps=sum(image.swaps for image in images),
        score_difference=max(image.score_difference for image in images),
        box_difference=max(image.box_difference for image in images),
        worst_images=tuple(image.image_id for image in sorted(images, key=_badness, reverse=True)[:10]),
    )


def _badness(image: ImageAgreement) -> tuple[int, float]:
    unmatched = image.unmatched_reference + image.unmatched_candidate
    return unmatched, image.score_difference / SCORE_TOLERANCE + image.box_difference / BOX_TOLERANCE


def _with_unavailable(
    candidates: Sequence[Session | Unavailable],
    measured: Sequence[ParityRow],
    detections: Sequence[Mapping[int, Detections]],
) -> tuple[tuple[ParityRow, ...], tuple[Mapping[int, Detections] | None, ...]]:
    """Put rows of what could not run between the measured ones, in the order given; the reference comes first."""
    rows = [measured[0]]
    found: list[Mapping[int, Detections] | None] = [detections[0]]
    remaining = iter(zip(measured[1:], detections[1:], strict=True))
    for candidate in candidates:
        if isinstance(candidate, Unavailable):
            rows.append(ParityRow(candidate.name, candidate.backend, candidate.precision, reason=candidate.reason))
            found.append(None)
        else:
            row, its_detections = next(remaining)
            rows.append(row)
            found.append(its_detections)
    return tuple(rows), tuple(found)


_TASK_FIELDS = (
    *("head", "levels", "input_height", "input_width"),
    *("shorter_side", "longer_side", "category_ids", "nms_iou"),
)


def _check_same_task(reference: Session, session: Session) -> None:
    for field in _TASK_FIELDS:
        ours, theirs = getattr(reference.metadata, field), getattr(session.metadata, field)
        if ours != theirs:
            raise ValueError(
                f"{session.name} and {reference.name} differ in {field} ({theirs} and {ours}): their detections"
                " cannot be compared; export again with the same choice"
            )


def _backend_of(path: Path, device: str) -> tuple[str, str]:
    """Backend and precision of a file that could not be opened, as far as its name and manifest tell."""
    if path.suffix.lower() == ".engine":
        from runtime.tensorrt_rtx import read_manifest

        try:
            manifest = read_manifest(path)
        except ValueError:
            return "tensorrt-rtx", "?"
        return manifest.backend, manifest.precision
    kind = device.partition(":")[0]
    if path.suffix.lower() == ".onnx":
        return f"onnxruntime-{kind}", "?"
    return ("pytorch" if kind == "cpu" else f"pytorch-{kind}"), "?"


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parity_table(report: ParityReport) -> Group:
    """The report for a terminal of 80 columns: a table, and below it why a row was not run.

    Files are named only where backend and precision do not tell the rows apart.
    """
    name_rows = len({(row.backend, row.precision) for row in report.rows}) < len(report.rows)
    table = Table(
        title=f"Parity on {len(report.image_ids)} images of {Path(report.dataset).name}",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for index, heading in enumerate(_SHORT_HEADINGS):
        # Only names may wrap; a folded number is misread.
        table.add_column(heading, justify="left" if index < 2 else "right", no_wrap=index > 0, overflow="fold")
    notes = []
    for row in report.rows:
        name, backend, *cells = row_cells(row)
        table.add_row(*map(Text, [f"{backend}\n{name}" if name_rows else backend, *cells]))
        if row.reason is not None:
            notes.append(Text(f"{row.name} ({row.backend}) was not run: {row.reason}", style="yellow"))
    return Group(table, *notes, Text(report.machine.summary(), style="dim"))


def row_cells(row: ParityRow) -> list[str]:
    """A row's values as text, in the order of ``HEADINGS``."""
    cells = [row.name, row.backend, row.precision]
    if row.result is None:
        return [*cells, "not run", *[""] * (len(HEADINGS) - 4)]
    agreement = row.agreement
    return [
        *cells,
        f"{row.result.ap:.3f}",
        "" if row.ap_difference is None else f"{row.ap_difference:+.4f}",
        "" if agreement is None else f"{agreement.score_difference:.1e}",
        "" if agreement is None else f"{agreement.box_difference:.1e}",
        "" if agreement is None else str(agreement.unmatched),
        "" if agreement is None else str(agreement.cut_ties + agreement.swaps),
        *("" if value is None else milliseconds(value) for value in (row.latency_p50_ms, row.latency_p95_ms)),
    ]
