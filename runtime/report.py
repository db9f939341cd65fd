"""A self-contained HTML page of a parity comparison: its table, detections drawn on images, and how they came about."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from runtime.coco_evaluation import CocoFolder
from runtime.drawing import draw_detections
from runtime.files import write_text
from runtime.parity import HEADINGS, ParityReport, row_cells
from runtime.stages import stage_panels

if TYPE_CHECKING:
    import jinja2

    from runtime.session import Session

_PICTURE_SIDE = 640
_STAGE_IMAGES = 3


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


def write_report(
    path: str | os.PathLike[str],
    report: ParityReport,
    dataset: CocoFolder,
    *,
    pictures: int = 6,
    title: str = "Parity report",
    notes: Sequence[str] = (),
    score_threshold: float = 0.3,
    reference: Session | None = None,
) -> Path:
    """Write the page: the table, ``notes`` as paragraphs, and up to ``pictures`` images drawn under every backend.

    The images where backends differ most come first, then evenly spaced others. With a ``reference`` session that
    shows its stages, the first three of them are also drawn stage by stage. The file needs no network.
    """
    chosen = _chosen_images(report, pictures)
    groups = [_picture_group(report, dataset, image_id, score_threshold) for image_id in chosen]
    stage_groups = []
    if reference is not None and reference.shows_stages:
        stage_groups = [
            _stage_group(reference, dataset, image_id, score_threshold) for image_id in chosen[:_STAGE_IMAGES]
        ]
    versions = report.machine.versions
    page = _template().render(
        title=title,
        dataset=Path(report.dataset).name,
        image_count=len(report.image_ids),
        metadata=report.metadata,
        headings=HEADINGS,
        rows=[(row_cells(row), row.reason) for row in report.rows],
        verdicts=_verdicts(report),
        notes=notes,
        groups=groups,
        stage_groups=stage_groups,
        score_threshold=score_threshold,
        machine=report.machine,
        versions=", ".join(f"{name} {text}" for name, text in versions.items()),
    )
    write_text(path, page)
    return Path(path)


def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("runtime", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _chosen_images(report: ParityReport, count: int) -> list[int]:
    """The worst disagreements (at most half), then images spread over the set that show detections."""
    disagreeing: list[int] = []
    for row in report.rows:
        if row.agreement is not None and row.agreement.images_within < row.agreement.images:
            differing = row.agreement.images - row.agreement.images_within
            disagreeing += [image for image in row.agreement.worst_images[:differing] if image not in disagreeing]
    chosen = disagreeing[: count // 2]
    others = [image_id for image_id in report.image_ids if image_id not in chosen]
    wanted = min(count - len(chosen), len(others))
    return chosen + [others[index * len(others) // wanted] for index in range(wanted)]


def _verdicts(report: ParityReport) -> list[str]:
    """A sentence per compared backend."""
    sentences = []
    for row in report.rows:
        if row.agreement is None:
            continue
        sentences.append(
            f"{row.name} ({row.backend}): the same detections as the reference on {row.agreement.images_within} of"
            f" {row.agreement.images} images, within {report.score_tolerance:g} in score and"
            f" {report.box_tolerance:g} pixels in boxes, apart from ties."
        )
    return sentences


def _picture_group(report: ParityReport, dataset: CocoFolder, image_id: int, score_threshold: float) -> PictureGroup:
    image = dataset.load(image_id)
    image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    pictures = []
    for row, detections in zip(report.rows, report.detections, strict=True):
        if detections is None:
            continue
        found = detections[image_id]
        drawn = draw_detections(image, found, report.metadata, score_threshold)
        count = len(found.above(score_threshold))
        caption = f"{row.name}, {row.backend} {row.precision}: {count} {'object' if count == 1 else 'objects'}"
        pictures.append(Picture(_data_uri(drawn), caption, drawn.width, drawn.height))
    return PictureGroup(dataset.path(image_id).name, tuple(pictures))


def _stage_group(reference: Session, dataset: CocoFolder, image_id: int, score_threshold: float) -> PictureGroup:
    image = dataset.load(image_id)
    panels = stage_panels(image, reference.stages(image), reference.metadata, score_threshold)
    pictures = [
        Picture(_data_uri(panel.picture), panel.caption, panel.picture.width, panel.picture.height) for panel in panels
    ]
    return PictureGroup(dataset.path(image_id).name, tuple(pictures))


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
