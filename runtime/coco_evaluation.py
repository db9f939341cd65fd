"""Box average precision in COCO's way, with pycocotools."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.coco_file import Id, rank_of
from asag.runtime.parity.bootstrap import CategoryMatches, collect_matches
from asag.runtime.postprocessing import Detections
from asag.runtime.records import to_json
from asag.runtime.session import Session

MAX_DETECTIONS = 100
"""Of one image and class that count, as in COCO's own evaluation."""


@dataclasses.dataclass(frozen=True)
class ClassResult:
    """AP and AR of one class over IoU 0.50:0.95, AP at 0.50, and its objects that are no crowd."""

    name: str
    ap: float
    ap50: float
    ar: float
    objects: int


@dataclasses.dataclass(frozen=True)
class CocoResult:
    """Average precision of boxes, 0..1: over IoU 0.50:0.95, at 0.50, at 0.75, and of small, medium and large objects;
    average recall over IoU 0.50:0.95.

    A value is not-a-number where the images hold no object it could be computed of. ``images`` were evaluated.
    """

    ap: float
    ap50: float
    ap75: float
    aps: float
    apm: float
    apl: float
    images: int
    ar: float = math.nan
    classes: tuple[ClassResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The values with None for not-a-number, which JSON does not have."""
        return to_json(self)


def evaluate(
    dataset: CocoFolder, detections: Mapping[Id, Detections], max_detections: int = MAX_DETECTIONS
) -> CocoResult:
    """COCO average precision of the detections of some or all images (keys are image ids).

    Labels are those of ``dataset.category_ids``; detections of other classes do not count. At most `max_detections` of
    an image and class count, crowd regions are ignored, as COCO's own evaluation does.
    """
    return evaluate_with_matches(dataset, detections, max_detections)[0]


def evaluate_with_matches(
    dataset: CocoFolder, detections: Mapping[Id, Detections], max_detections: int = MAX_DETECTIONS
) -> tuple[CocoResult, list[CategoryMatches]]:
    """:func:`evaluate`, and what `runtime.parity.bootstrap` resamples; its images are in the order of their ids."""
    from pycocotools.cocoeval import COCOeval

    unknown = [image_id for image_id in detections if image_id not in dataset.images]
    if unknown:
        raise ValueError(f"detections of images that {dataset.annotations_path.name} does not hold: {unknown[:3]}")
    # pycocotools sorts ids, and takes an annotation of id 0 for none: it gets numbers that are made here.
    numbers = {image_id: number for number, image_id in enumerate(sorted(detections, key=rank_of), start=1)}
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _index(dataset, numbers, _objects(dataset, numbers)),
            _index(dataset, numbers, _found(detections, numbers)),
            "bbox",
        )
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    return _result(evaluation, dataset, len(detections)), collect_matches(evaluation)


def _result(evaluation: Any, dataset: CocoFolder, images: int) -> CocoResult:
    """The means that COCO's summary gives, of all objects and of each class."""
    # [IoU thresholds, recalls, classes, sizes] and [IoU thresholds, classes, sizes]
    precision, recall = evaluation.eval["precision"][..., 0], evaluation.eval["recall"][..., 0]
    half, three_quarters = 0, 5
    found = collections.Counter(
        annotation["category_id"] for annotation in evaluation.cocoGt.anns.values() if not annotation["iscrowd"]
    )
    return CocoResult(
        ap=_mean(precision[..., 0]),
        ap50=_mean(precision[half, ..., 0]),
        ap75=_mean(precision[three_quarters, ..., 0]),
        aps=_mean(precision[..., 1]),
        apm=_mean(precision[..., 2]),
        apl=_mean(precision[..., 3]),
        images=images,
        ar=_mean(recall[..., 0]),
        classes=tuple(
            ClassResult(
                name=name,
                ap=_mean(precision[:, :, place, 0]),
                ap50=_mean(precision[half, :, place, 0]),
                ar=_mean(recall[:, place, 0]),
                objects=found[number],
            )
            for place, (number, name) in enumerate(zip(dataset.category_ids, dataset.category_names, strict=True))
        ),
    )


def _mean(values: NDArray[np.float64]) -> float:
    """Of what pycocotools could compute; it writes -1 elsewhere."""
    values = values[values > -1]
    return float(np.mean(values)) if values.size else math.nan


def evaluate_session(
    session: Session,
    dataset: CocoFolder,
    image_ids: Sequence[Id] | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    classes: Sequence[str] = (),
    max_detections: int = MAX_DETECTIONS,
) -> tuple[CocoResult, dict[Id, Detections]]:
    """Detect on the dataset's images (or some of them) and evaluate; ``progress`` gets (images done, all).

    `classes` are names of those that count; without them the model and the data set must have the same ones. Raises
    ValueError when they do not, and when the images hold no object, before the first is read: there is nothing to
    measure.
    """
    dataset = dataset.for_model(session.metadata, classes)
    image_ids = dataset.image_ids if image_ids is None else image_ids
    check_measurable(dataset, image_ids)
    detections = {}
    stream = session.stream((dataset.load(image_id) for image_id in image_ids), batch_size)
    for image_id, found in zip(image_ids, stream, strict=True):
        detections[image_id] = found
        if progress is not None:
            progress(len(detections), len(image_ids))
    return evaluate(dataset, detections, max_detections), detections


def check_measurable(dataset: CocoFolder, image_ids: Sequence[Id]) -> None:
    """ValueError or FileNotFoundError unless all images are there and hold an object to find."""
    if not any((~dataset.annotations.crowd[dataset.objects(image_id)]).any() for image_id in image_ids):
        raise ValueError(
            f"{dataset.annotations_path} has no objects in the {len(image_ids)} images to evaluate: there is no AP to"
            " measure"
        )
    dataset.check_images(image_ids)


def results(dataset: CocoFolder, detections: Mapping[Id, Detections]) -> list[dict[str, Any]]:
    """Detections in COCO's results format with the data set's own ids; those of classes that it lacks are left out."""
    return [
        {**record, "category_id": dataset.category_id(record["category_id"])}
        for image_id, found in detections.items()
        for record in coco_records(image_id, found)
        if record["category_id"] in dataset.category_ids
    ]


def coco_records(image_id: Id, detections: Detections) -> list[dict[str, Any]]:
    """Detections in COCO's results format: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height), ``score``."""
    boxes = detections.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {
            "image_id": image_id,
            "category_id": int(label),
            "bbox": [float(value) for value in box],
            "score": float(score),
        }
        for box, score, label in zip(boxes, detections.scores, detections.labels, strict=True)
    ]


def _found(detections: Mapping[Id, Detections], numbers: Mapping[Id, int]) -> Iterator[dict[str, Any]]:
    for image_id, found in detections.items():
        if not (np.isfinite(found.scores).all() and np.isfinite(found.boxes).all()):
            raise ValueError(f"the model's detections of image {image_id} are not numbers: there is no AP to measure")
        for record in coco_records(numbers[image_id], found):
            yield {**record, "area": record["bbox"][2] * record["bbox"][3], "iscrowd": 0}


def _objects(dataset: CocoFolder, numbers: Mapping[Id, int]) -> Iterator[dict[str, Any]]:
    annotations = dataset.annotations
    for image_id, number in numbers.items():
        held = dataset.objects(image_id)
        for label, box, area, crowd in zip(
            annotations.labels[held],
            annotations.boxes[held],
            annotations.areas[held],
            annotations.crowd[held],
            strict=True,
        ):
            yield {
                "image_id": number,
                "category_id": dataset.category_ids[label],
                "bbox": box.tolist(),
                "area": float(area),
                "iscrowd": int(crowd),
            }


def _index(dataset: CocoFolder, numbers: Mapping[Id, int], annotations: Iterator[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in numbers.values()],
        "categories": [{"id": number} for number in dataset.category_ids],
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco
