"""A parity run as one JSON document: the numbers and the pictures a report shows, without the models or the dataset."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.coco_file import Id
from asag.runtime.drawing import Mark, annotation_marks, detection_marks, draw_marks
from asag.runtime.errors import one_line
from asag.runtime.parity.agreement import differing
from asag.runtime.parity.results import ParityReport, Unavailable
from asag.runtime.postprocessing import Detections
from asag.runtime.records import check_format, convert, to_json
from asag.runtime.schema_1 import upgraded_metadata
from asag.runtime.session import Session
from asag.runtime.stages.draw import Panel, stage_panels

FORMAT = 1
KIND = "asag parity"
_REMEDY = "write it with `asag parity --json`"

_PICTURE_SIDE = 640
_STAGE_IMAGES = 3
SCORE_THRESHOLD = 0.3
"""Detections that score less are not drawn."""
VISIBLE_SCORE, VISIBLE_PIXELS = 0.01, 1.0
"""What differs less is not marked in pictures: in 16 bits nearly every detection is beyond parity's tolerances."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawn image as a data URI, with its caption and description."""

    source: str
    caption: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class PictureGroup:
    """Pictures of the same image: under every backend that ran, or the stages of the method."""

    title: str
    pictures: tuple[Picture, ...]


@dataclasses.dataclass(frozen=True)
class ReportDocument:
    """What a page shows of one parity run.

    ``pictures`` show the detections, ``stage_pictures`` the reference's stages, and ``start_pictures`` reference and
    candidate on an image where their stages begin to differ. A report read from a file holds no detections.
    """

    report: ParityReport
    score_threshold: float
    pictures: tuple[PictureGroup, ...]
    stage_pictures: tuple[PictureGroup, ...]
    start_pictures: tuple[PictureGroup, ...]

    def to_json(self) -> dict[str, Any]:
        """The document as JSON values, for :func:`read_document`."""
        return {
            "format": f"{KIND} {FORMAT}",
            **self.report.to_json(),
            "image_ids": self.report.image_ids,
            "metadata": to_json(self.report.metadata),
            "score_threshold": self.score_threshold,
            "pictures": to_json(self.pictures),
            "stage_pictures": to_json(self.stage_pictures),
            "start_pictures": to_json(self.start_pictures),
        }


def make_document(
    report: ParityReport,
    dataset: CocoFolder,
    *,
    pictures: int = 6,
    reference: Session | None = None,
    candidates: Sequence[Session | Unavailable] = (),
) -> ReportDocument:
    """Draw up to ``pictures`` images: where stages or detections differ most first, then evenly spaced others.

    With a ``reference`` session that shows its stages, the first three are also drawn stage by stage; and for every one
    of the ``candidates`` whose stages differ, both are drawn on the first image where they do.
    """
    chosen = _chosen_images(report, pictures)
    groups = tuple(_picture_group(report, dataset, image_id, SCORE_THRESHOLD) for image_id in chosen)
    stage_groups: tuple[PictureGroup, ...] = ()
    if reference is not None and reference.shows_stages:
        stage_groups = tuple(
            _stage_group(reference, dataset, image_id, SCORE_THRESHOLD) for image_id in chosen[:_STAGE_IMAGES]
        )
    starts = _start_groups(report, dataset, reference, candidates, SCORE_THRESHOLD)
    return ReportDocument(report, SCORE_THRESHOLD, groups, stage_groups, starts)


def read_document(path: Path, content: Mapping[str, Any]) -> ReportDocument:
    """The document of JSON values read from ``path``; ValueError when they are not what this version writes."""
    written = re.fullmatch(rf"{KIND} (\d{{1,9}})", str(content.get("format")))
    if written is None:
        raise ValueError(f"{path} holds no parity report; {_REMEDY}")
    check_format(path, int(written[1]), FORMAT, _REMEDY)
    try:
        values = dict(content)
        if isinstance(values.get("metadata"), dict) and "schema" not in values["metadata"]:
            values["metadata"] = upgraded_metadata(values["metadata"])
        report = convert({**values, "detections": ()}, ParityReport)
        report = dataclasses.replace(report, detections=(None,) * len(report.rows))
        return convert({**content, "report": report}, ReportDocument)
    except ValueError as error:
        raise ValueError(f"{path} holds no parity report that can be read: {one_line(error)}; {_REMEDY}") from None


def _chosen_images(report: ParityReport, count: int) -> list[Id]:
    """The worst disagreements (at most half), then images spread over the set that show detections."""
    disagreeing: list[Id] = []
    for stages in report.stages:
        if stages.first is not None:
            disagreeing += [image for image in stages.first.images_over[:1] if image not in disagreeing]
    for row in report.rows:
        if row.agreement is not None and row.agreement.images_within < row.agreement.images:
            differing = row.agreement.images - row.agreement.images_within
            disagreeing += [image for image in row.agreement.worst_images[:differing] if image not in disagreeing]
    chosen = disagreeing[: max(count // 2, min(count, 1))]
    others = [image_id for image_id in report.image_ids if image_id not in chosen]
    wanted = min(count - len(chosen), len(others))
    return chosen + [others[index * len(others) // wanted] for index in range(wanted)]


def _picture_group(report: ParityReport, dataset: CocoFolder, image_id: Id, score_threshold: float) -> PictureGroup:
    """The annotations, then what every model found; in a candidate's picture, what differs from the reference's."""
    image = dataset.load(image_id)
    size = (image.height, image.width)
    image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    marks = annotation_marks(dataset, image_id)
    pictures = [_picture(Panel(draw_marks(image, marks, size), f"annotated: {_count(len(marks), 'object')}"))]
    ran = [
        (row, detections[image_id])
        for row, detections in zip(report.rows, report.detections, strict=True)
        if detections is not None
    ]
    for row, found in ran:
        marks, differences = _compared_marks(ran[0][1], found, report, score_threshold)
        count = len(found.above(score_threshold))
        caption = f"{row.name}, {row.backend} {row.precision}: {_count(count, 'object')}{differences}"
        pictures.append(_picture(Panel(draw_marks(image, marks, size), caption)))
    return PictureGroup(dataset.path(image_id).name, tuple(pictures))


def _compared_marks(
    reference: Detections, found: Detections, report: ParityReport, score_threshold: float
) -> tuple[list[Mark], str]:
    """What is drawn of the detections found: those that differ are ringed, those missing dashed; and a few words."""
    missing, different = differing(reference, found, VISIBLE_SCORE, VISIBLE_PIXELS)
    missing &= reference.scores >= score_threshold
    shown = found.scores >= score_threshold
    marks = [
        dataclasses.replace(mark, ringed=bool(ringed))
        for mark, ringed in zip(detection_marks(found.select(shown), report.metadata), different[shown], strict=True)
    ]
    lost = detection_marks(reference.select(missing), report.metadata)
    marks += [dataclasses.replace(mark, text=f"missing: {mark.text}", ringed=True, dashed=True) for mark in lost]
    told = [f"{count} {word}" for count, word in ((different[shown].sum(), "differ"), (len(lost), "missing")) if count]
    return marks, "".join(f", {text}" for text in told)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _stage_group(reference: Session, dataset: CocoFolder, image_id: Id, score_threshold: float) -> PictureGroup:
    image = dataset.load(image_id)
    panels = stage_panels(image, reference.stages(image), score_threshold)
    return PictureGroup(dataset.path(image_id).name, tuple(_picture(panel) for panel in panels))


def _start_groups(
    report: ParityReport,
    dataset: CocoFolder,
    reference: Session | None,
    candidates: Sequence[Session | Unavailable],
    score_threshold: float,
) -> tuple[PictureGroup, ...]:
    """What both sides show of their stages, for each candidate that differs somewhere."""
    groups = []
    for stages in report.stages:
        same = [
            candidate
            for candidate in candidates
            if (candidate.name, candidate.backend, candidate.precision)
            == (stages.name, stages.backend, stages.precision)
        ]
        if stages.first is None or not same or reference is None:
            continue
        (candidate, *_) = same
        assert isinstance(candidate, Session)
        image_id = stages.first.images_over[0]
        image = dataset.load(image_id)
        seen = {"reference": reference.stages(image), stages.name: candidate.stages(image)}
        both = set.intersection(*(set(side.values) for side in seen.values()))
        pictures = []
        for name, side in seen.items():
            shared = dataclasses.replace(side, values={value: side.values[value] for value in both})
            panels = stage_panels(image, shared, score_threshold)
            pictures += [_picture(dataclasses.replace(panel, caption=f"{name}: {panel.caption}")) for panel in panels]
        title = f"{dataset.path(image_id).name}: {stages.name} starts to differ at {stages.first.stage}"
        groups.append(PictureGroup(title, tuple(pictures)))
    return tuple(groups)


def _picture(panel: Panel) -> Picture:
    return Picture(_data_uri(panel.picture), panel.caption, panel.picture.width, panel.picture.height)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
