"""Comparing backends with a reference: accuracy, agreement image by image, latency."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.coco_evaluation import CocoResult, check_measurable, evaluate_with_matches
from asag.runtime.coco_file import Id
from asag.runtime.errors import BackendUnavailableError, one_line
from asag.runtime.machine import describe_machine, processor_load
from asag.runtime.opening import open_session
from asag.runtime.parity.agreement import BOX_TOLERANCE, SCORE_TOLERANCE, ImageAgreement, compare_detections
from asag.runtime.parity.batch_checks import BATCH_SIZES, BatchCheck, check_batches
from asag.runtime.parity.bootstrap import average_precision, draw_weights, interval
from asag.runtime.parity.results import AP_NAMES, SCORE_BINS, Agreement, ParityReport, ParityRow, Unavailable
from asag.runtime.parity.table import HEADINGS, accuracy_table, parity_table, row_cells
from asag.runtime.postprocessing import Detections
from asag.runtime.session import Session

STAGE_IMAGES = 8
"""Images whose stages are compared; each stage is read back in full."""

__all__ = [
    "HEADINGS",
    "Agreement",
    "ParityReport",
    "ParityRow",
    "Unavailable",
    "accuracy_table",
    "add_stages",
    "compare",
    "open_candidate",
    "open_reference",
    "parity_table",
    "row_cells",
]


def open_candidate(path: str | os.PathLike[str], **options: Any) -> Session | Unavailable:
    """:func:`runtime.opening.open_session`, with an unavailable backend as a row for the table instead of an error."""
    try:
        return open_session(path, **options)
    except BackendUnavailableError as error:
        name = Path(path).name
        backend, precision = _backend_of(Path(path), str(options.get("device", "cpu")))
        return Unavailable(name, backend, precision, one_line(error))


def open_reference(
    path: str | os.PathLike[str], candidates: Sequence[Session | Unavailable], **options: Any
) -> Session:
    """:func:`runtime.opening.open_session` of the reference; a checkpoint is deployed as the first candidate that runs
    here was exported (input size and choices), so that a file exported with options is compared with the same model.
    """
    sessions = [candidate for candidate in candidates if isinstance(candidate, Session)]
    if Path(path).suffix.lower() == ".safetensors" and sessions:
        exported = sessions[0].metadata
        options |= {"input_size": exported.input_size, "choices": exported.choices}
    return open_session(path, **options)


def compare(
    reference: Session,
    candidates: Sequence[Session | Unavailable],
    dataset: CocoFolder,
    images: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    classes: Sequence[str] = (),
) -> ParityReport:
    """Run every backend on the dataset's first ``images`` images (None: all), one at a time, in turn.

    Each image is read once and given to all, so that their latencies see the same conditions. Afterwards each is
    checked for results that depend on the batch, at ``batch_sizes`` (empty: not at all). ``progress`` gets (images
    done, all). Raises ValueError when a candidate prepares images otherwise than the reference, or has other
    classes than the dataset.
    """
    if images is not None and images < 1:
        raise ValueError(f"the number of images must be at least 1, it is {images}")
    load = processor_load()
    dataset = dataset.for_model(reference.metadata, classes)
    image_ids = dataset.image_ids[:images]
    check_measurable(dataset, image_ids)
    sessions = [reference, *(candidate for candidate in candidates if isinstance(candidate, Session))]
    for session in sessions:
        _check_same_task(reference, session)
    detections: list[dict[Id, Detections]] = [{} for _ in sessions]
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
        machine=describe_machine(load),
        score_tolerance=SCORE_TOLERANCE,
        box_tolerance=BOX_TOLERANCE,
        batch_checks=_check_batches(sessions, dataset, image_ids, batch_sizes),
        stages=(),
    )


def _check_batches(
    sessions: Sequence[Session], dataset: CocoFolder, image_ids: Sequence[Id], batch_sizes: Sequence[int]
) -> tuple[BatchCheck, ...]:
    if not batch_sizes:
        return ()
    images = [dataset.load(image_id) for image_id in image_ids[: max(batch_sizes)]]
    return tuple(check for session in sessions for check in check_batches(session, images, batch_sizes))


def add_stages(
    report: ParityReport,
    reference: Session,
    candidates: Sequence[Session | Unavailable],
    dataset: CocoFolder,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """The report with the stages of every candidate that shows them, on up to :data:`STAGE_IMAGES` images.

    Those on which a candidate differs most come first. Where either side does not show its stages, nothing is
    added.
    """
    from asag.runtime.parity.stage_comparison import can_compare, compare_stages

    found = []
    for row, candidate in zip(report.rows[1:], candidates, strict=True):
        if row.agreement is None or not can_compare(reference, candidate):
            continue
        order = dict.fromkeys((*row.agreement.worst_images, *report.image_ids))
        chosen = list(order)[:STAGE_IMAGES]
        assert isinstance(candidate, Session)
        found.append(compare_stages(reference, candidate, dataset, chosen, progress))
    return dataclasses.replace(report, stages=tuple(found))


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
    detections: Sequence[Mapping[Id, Detections]],
    seconds: Sequence[Sequence[float]],
) -> list[ParityRow]:
    reference_result, matches = evaluate_with_matches(dataset, detections[0])
    weights = draw_weights(len(detections[0]))
    reference_samples = samples = average_precision(matches, weights)
    rows = []
    for index, session in enumerate(sessions):
        result = reference_result
        if index:
            result, matches = evaluate_with_matches(dataset, detections[index])
            samples = average_precision(matches, weights)
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
                differences=None if index == 0 else _differences(result, reference_result),
                ap_interval=interval(samples),
                ap_difference_interval=None if index == 0 else interval(samples - reference_samples),
            )
        )
    return rows


def _differences(result: CocoResult, reference: CocoResult) -> dict[str, float]:
    return {name: getattr(result, name) - getattr(reference, name) for name in AP_NAMES}


def _agreement(session: Session, reference: Mapping[Id, Detections], candidate: Mapping[Id, Detections]) -> Agreement:
    limit, suppressed = session.metadata.max_detections, session.metadata.nms_iou is not None
    images = [
        compare_detections(image_id, reference[image_id], candidate[image_id], limit, suppressed=suppressed)
        for image_id in reference
    ]
    scores = np.concatenate([image.score_differences for image in images])
    ious = np.concatenate([image.ious for image in images])
    # Of two lists of different length the longer counts: a detection too many is a disagreement as one too few.
    detections = sum(image.matched + max(image.unmatched_reference, image.unmatched_candidate) for image in images)
    return Agreement(
        share_iou_99=float((ious >= 0.99).sum() / detections) if detections else 1.0,
        share_iou_90=float((ious >= 0.9).sum() / detections) if detections else 1.0,
        score_quantiles=tuple(np.quantile(scores, [0.5, 0.9, 0.99, 1.0]).tolist()) if len(scores) else (0.0,) * 4,
        score_histogram=tuple(np.bincount(np.searchsorted(SCORE_BINS, scores), minlength=len(SCORE_BINS) + 1).tolist()),
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
    detections: Sequence[Mapping[Id, Detections]],
) -> tuple[tuple[ParityRow, ...], tuple[Mapping[Id, Detections] | None, ...]]:
    """Put rows of what could not run between the measured ones, in the order given; the reference comes first."""
    rows = [measured[0]]
    found: list[Mapping[Id, Detections] | None] = [detections[0]]
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
    *("category_ids", "category_names", "choices"),
    *("input_height", "input_width", "shorter_side", "longer_side", "nms_iou"),
    *("resize", "interpolation"),
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
        from asag.runtime.engines.manifest import read_manifest

        try:
            manifest = read_manifest(path)
        except ValueError:
            return "tensorrt-rtx", "?"
        return manifest.backend, manifest.precision
    kind = device.partition(":")[0]
    if path.suffix.lower() == ".onnx":
        return f"onnxruntime-{kind}", "?"
    return ("pytorch" if kind == "cpu" else f"pytorch-{kind}"), "?"
