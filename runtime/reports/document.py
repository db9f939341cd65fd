"""A parity run as one JSON document: the numbers and the pictures a report shows, without the models or the dataset."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from runtime.coco_evaluation import CocoFolder, CocoResult
from runtime.drawing import draw_detections
from runtime.errors import one_line
from runtime.machine import Machine
from runtime.metadata import ModelMetadata
from runtime.parity.batch_checks import BatchCheck
from runtime.parity.bootstrap import Interval
from runtime.parity.results import Agreement, ParityReport, ParityRow, Unavailable
from runtime.parity.stage_comparison import StageDifference, StageReport
from runtime.session import Session
from runtime.stages.draw import Panel, stage_panels

FORMAT = "asag parity 1"

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


@dataclasses.dataclass(frozen=True)
class ReportDocument:
    """What a page shows of one parity run.

    ``groups`` show the detections, ``stage_groups`` the reference's stages, and ``start_groups`` reference and
    candidate on an image where their stages begin to differ. A report read from a file holds no detections.
    """

    report: ParityReport
    groups: tuple[PictureGroup, ...]
    stage_groups: tuple[PictureGroup, ...]
    start_groups: tuple[PictureGroup, ...]
    score_threshold: float

    def to_json(self) -> dict[str, Any]:
        """The document as JSON values, for :func:`read_document`."""
        return {
            "format": FORMAT,
            **self.report.to_json(),
            "image_ids": self.report.image_ids,
            "metadata": dataclasses.asdict(self.report.metadata),
            "score_threshold": self.score_threshold,
            "pictures": [dataclasses.asdict(group) for group in self.groups],
            "stage_pictures": [dataclasses.asdict(group) for group in self.stage_groups],
            "start_pictures": [dataclasses.asdict(group) for group in self.start_groups],
        }


def make_document(
    report: ParityReport,
    dataset: CocoFolder,
    *,
    pictures: int = 6,
    score_threshold: float = 0.3,
    reference: Session | None = None,
    candidates: Sequence[Session | Unavailable] = (),
) -> ReportDocument:
    """Draw up to ``pictures`` images: where stages or detections differ most first, then evenly spaced others.

    With a ``reference`` session that shows its stages, the first three are also drawn stage by stage; and for every one
    of the ``candidates`` whose stages differ, both are drawn on the first image where they do.
    """
    chosen = _chosen_images(report, pictures)
    groups = tuple(_picture_group(report, dataset, image_id, score_threshold) for image_id in chosen)
    stage_groups: tuple[PictureGroup, ...] = ()
    if reference is not None and reference.shows_stages:
        stage_groups = tuple(
            _stage_group(reference, dataset, image_id, score_threshold) for image_id in chosen[:_STAGE_IMAGES]
        )
    starts = _start_groups(report, dataset, reference, candidates, score_threshold)
    return ReportDocument(report, groups, stage_groups, starts, score_threshold)


def read_document(path: Path, content: Mapping[str, Any]) -> ReportDocument:
    """The document of JSON values read from ``path``; ValueError when they are not what this version writes."""
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this version reads {FORMAT!r}")
        metadata: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content["metadata"].items()
        }
        machine = {**content["machine"], "gpus": tuple(content["machine"]["gpus"])}
        rows = tuple(_row(values) for values in content["rows"])
        report = ParityReport(
            dataset=content["dataset"],
            image_ids=tuple(content["image_ids"]),
            rows=rows,
            detections=(None,) * len(rows),
            metadata=ModelMetadata(**metadata),
            machine=Machine(**machine),
            score_tolerance=content["score_tolerance"],
            box_tolerance=content["box_tolerance"],
            batch_checks=tuple(_dataclass(BatchCheck, values) for values in content["batch_checks"]),
            stages=tuple(_stages(values) for values in content["stages"]),
        )
        groups, stage_groups, start_groups = (
            tuple(
                PictureGroup(group["title"], tuple(_dataclass(Picture, picture) for picture in group["pictures"]))
                for group in content[key]
            )
            for key in ("pictures", "stage_pictures", "start_pictures")
        )
        return ReportDocument(report, groups, stage_groups, start_groups, content["score_threshold"])
    except KeyError as error:
        raise ValueError(
            f"{path} holds no parity report: {error} is missing; write it with `asag parity --json`"
        ) from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds no parity report that can be read: {one_line(error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError in one line when it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path} as JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _row(values: Mapping[str, Any]) -> ParityRow:
    made = dict(values)
    if made["result"] is not None:
        result: dict[str, Any] = {n: math.nan if v is None else v for n, v in made["result"].items()}
        made["result"] = CocoResult(**result)
    if made["agreement"] is not None:
        made["agreement"] = _dataclass(Agreement, made["agreement"])
    if made["differences"] is not None:
        made["differences"] = {n: math.nan if v is None else v for n, v in made["differences"].items()}
    for name in ("ap_interval", "ap_difference_interval"):
        if made[name] is not None:
            made[name] = Interval(**made[name])
    return ParityRow(**made)


def _stages(values: Mapping[str, Any]) -> StageReport:
    stages = []
    for stage in values["stages"]:
        numbers = {name: math.inf if stage[name] is None else stage[name] for name in ("largest", "mean")}
        stages.append(_dataclass(StageDifference, {**stage, **numbers}))
    return _dataclass(StageReport, {**values, "stages": tuple(stages)})


def _dataclass(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass from JSON values, lists as tuples; what it has no field for was computed from the others."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items() if n in names})


def _chosen_images(report: ParityReport, count: int) -> list[int]:
    """The worst disagreements (at most half), then images spread over the set that show detections."""
    disagreeing: list[int] = []
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
    panels = stage_panels(image, reference.stages(image), score_threshold)
    return PictureGroup(dataset.path(image_id).name, tuple(_picture(panel) for panel in panels))


def _start_groups(
    report: ParityReport,
    dataset: CocoFolder,
    reference: Session | None,
    candidates: Sequence[Session | Unavailable],
    score_threshold: float,
) -> tuple[PictureGroup, ...]:
    """The stages of both sides for each candidate that differs somewhere."""
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
        pictures = []
        for name, session in (("reference", reference), (stages.name, candidate)):
            panels = stage_panels(image, session.stages(image), score_threshold)
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
