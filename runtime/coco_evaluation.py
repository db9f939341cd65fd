"""Datasets in COCO's layout and box average precision with pycocotools."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.errors import one_line
from runtime.metadata import ModelMetadata
from runtime.parity.bootstrap import CategoryMatches, collect_matches
from runtime.postprocessing import Detections
from runtime.preprocessing import load_image
from runtime.records import to_json
from runtime.session import Session


@dataclasses.dataclass(frozen=True)
class CocoResult:
    """Average precision of boxes, 0..1: over IoU 0.50:0.95, at 0.50, at 0.75, and of small, medium and large objects.

    A value is not-a-number where the images hold no object it could be computed of. ``images`` were evaluated.
    """

    ap: float
    ap50: float
    ap75: float
    aps: float
    apm: float
    apl: float
    images: int

    def to_json(self) -> dict[str, float | int | None]:
        """The values with None for not-a-number, which JSON does not have."""
        return to_json(self)


class CocoFolder:
    """Images and box annotations in COCO's format.

    ``image_ids`` are in the file's order; ``category_ids`` and ``category_names`` in the order of the ids. Raises
    FileNotFoundError or ValueError naming what was looked for or what is wrong.
    """

    def __init__(self, images_dir: str | os.PathLike[str], annotations_json: str | os.PathLike[str]) -> None:
        self.images_dir = Path(images_dir)
        self.annotations_path = Path(annotations_json)
        if not self.annotations_path.is_file():
            raise FileNotFoundError(f"no annotations: looked for {self.annotations_path}")
        if not self.images_dir.is_dir():
            raise FileNotFoundError(f"no images: looked for the folder {self.images_dir}")
        content = _read_annotations(self.annotations_path)
        self.images: dict[int, dict[str, Any]] = {image["id"]: image for image in content["images"]}
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids = tuple(category["id"] for category in categories)
        self.category_names = tuple(str(category["name"]) for category in categories)
        self._content = content
        self._coco: Any = None

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Ids of the images, in the file's order."""
        return tuple(self.images)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def coco(self) -> Any:
        """The pycocotools index of the annotations."""
        if self._coco is None:
            self._coco = _coco_index(self._content)
        return self._coco

    def path(self, image_id: int) -> Path:
        """The image's file."""
        return self.images_dir / self.images[image_id]["file_name"]

    def load(self, image_id: int) -> Image.Image:
        """The image as RGB; ValueError when its size is not the annotated one, which would misplace every box."""
        image = load_image(self.path(image_id))
        record = self.images[image_id]
        if (image.width, image.height) != (record["width"], record["height"]):
            raise ValueError(
                f"{self.path(image_id)} is {image.width}x{image.height}, but {self.annotations_path.name} says"
                f" {record['width']}x{record['height']}: the images are not those of the annotations"
            )
        return image

    def check_categories(self, metadata: ModelMetadata) -> None:
        """ValueError unless the model's category ids are the dataset's."""
        if set(metadata.category_ids) != set(self.category_ids):
            raise ValueError(
                f"the model's classes ({_some(metadata.category_ids, metadata.category_names)}) are not those of"
                f" {self.annotations_path} ({_some(self.category_ids, self.category_names)})"
            )


def open_coco(path: str | os.PathLike[str], split: str = "val2017") -> CocoFolder:
    """Open ``path/annotations/instances_<split>.json`` with the images of ``path/<split>/``."""
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"dataset not found: {root} is not a folder")
    annotations, images = root / "annotations" / f"instances_{split}.json", root / split
    if not annotations.is_file() or not images.is_dir():
        raise FileNotFoundError(f"no COCO split {split} in {root}: looked for {annotations} and the folder {images}")
    return CocoFolder(images, annotations)


def evaluate(dataset: CocoFolder, detections: Mapping[int, Detections]) -> CocoResult:
    """COCO average precision of the detections of some or all images (keys are image ids).

    At most 100 detections per image count, crowd regions are ignored, as COCO's own evaluation does.
    """
    return evaluate_with_matches(dataset, detections)[0]


def evaluate_with_matches(
    dataset: CocoFolder, detections: Mapping[int, Detections]
) -> tuple[CocoResult, list[CategoryMatches]]:
    """:func:`evaluate`, and what `runtime.parity.bootstrap` resamples; its images are in the order of their ids."""
    from pycocotools.cocoeval import COCOeval

    unknown = [image_id for image_id in detections if image_id not in dataset.images]
    if unknown:
        raise ValueError(f"detections of images that {dataset.annotations_path.name} does not hold: {unknown[:3]}")
    found = _coco_index(
        {
            "images": [dataset.images[image_id] for image_id in detections],
            "categories": dataset._content["categories"],
            "annotations": list(_result_annotations(detections)),
        }
    )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(dataset.coco, found, "bbox")
        evaluation.params.imgIds = sorted(detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # pycocotools writes -1 where there is nothing to compute a value of.
    ap, ap50, ap75, aps, apm, apl = (float(value) if value >= 0 else math.nan for value in evaluation.stats[:6])
    return CocoResult(ap, ap50, ap75, aps, apm, apl, len(detections)), collect_matches(evaluation)


def evaluate_session(
    session: Session,
    dataset: CocoFolder,
    image_ids: Sequence[int] | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CocoResult, dict[int, Detections]]:
    """Detect on the dataset's images (or some of them) and evaluate; ``progress`` gets (images done, all)."""
    dataset.check_categories(session.metadata)
    image_ids = dataset.image_ids if image_ids is None else image_ids
    detections = {}
    stream = session.stream((dataset.load(image_id) for image_id in image_ids), batch_size)
    for image_id, found in zip(image_ids, stream, strict=True):
        detections[image_id] = found
        if progress is not None:
            progress(len(detections), len(image_ids))
    return evaluate(dataset, detections), detections


def coco_records(image_id: int, detections: Detections) -> list[dict[str, Any]]:
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


def _result_annotations(detections: Mapping[int, Detections]) -> Iterator[dict[str, Any]]:
    records = (record for image_id, found in detections.items() for record in coco_records(image_id, found))
    for number, record in enumerate(records, start=1):
        _, _, width, height = record["bbox"]
        yield {**record, "id": number, "area": width * height, "iscrowd": 0}


def _coco_index(content: Mapping[str, Any]) -> Any:
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
    return coco


def _read_annotations(path: Path) -> dict[str, Any]:
    """Parse and check the file; optional fields that pycocotools insists on are filled in."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path} as JSON: {one_line(error)}") from None
    wanted = {
        "images": {"id": int, "file_name": str, "height": int, "width": int},
        "categories": {"id": int, "name": str},
        "annotations": {"image_id": int, "category_id": int, "bbox": list},
    }
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in wanted):
        raise ValueError(f"{path} is not a COCO detection file: looked for the lists {', '.join(wanted)}")
    for section, fields in wanted.items():
        for index, record in enumerate(content[section]):
            wrong = [name for name, kind in fields.items() if not _has(record, name, kind)]
            if wrong:
                raise ValueError(f"{path}: {section}[{index}] has no proper {wrong[0]}")
    if not content["categories"]:
        raise ValueError(f"{path} names no categories")
    for section in ("images", "categories"):
        _refuse_repeated(path, section, (record["id"] for record in content[section]))
    for number, annotation in enumerate(content["annotations"], start=1):
        _complete_annotation(path, number, annotation)
    return content


def _complete_annotation(path: Path, number: int, annotation: dict[str, Any]) -> None:
    box = annotation["bbox"]
    if len(box) != 4 or not all(isinstance(value, int | float) and math.isfinite(value) for value in box):
        raise ValueError(f"{path}: annotations[{number - 1}] has no bbox of four numbers (x, y, width, height)")
    annotation.setdefault("id", number)
    annotation.setdefault("area", box[2] * box[3])
    annotation.setdefault("iscrowd", 0)


def _has(record: Any, name: str, kind: type) -> bool:
    return isinstance(record, dict) and isinstance(record.get(name), kind)


def _refuse_repeated(path: Path, section: str, ids: Iterable[int]) -> None:
    seen: set[int] = set()
    for identifier in ids:
        if identifier in seen:
            raise ValueError(f"{path}: the id {identifier} appears twice in {section}")
        seen.add(identifier)


def _some(ids: Sequence[int], names: Sequence[str]) -> str:
    listed = [f"{number} {name}" for number, name in zip(ids, names, strict=True)]
    return f"{len(ids)}: {', '.join([*listed[:4], *(['...'] if len(ids) > 4 else [])])}"
