from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from asag.runtime.coco_dataset import CocoFolder, open_coco
from asag.runtime.coco_evaluation import coco_records, evaluate, evaluate_session
from asag.runtime.postprocessing import Detections
from tests.runtime.toy_detector import ToySession


def perfect(dataset: CocoFolder, image_id: int, shift: float = 0.0) -> Detections:
    """The annotated objects as detections, moved right by ``shift`` pixels."""
    annotations, held = dataset.annotations, dataset.objects(image_id)
    counts = ~annotations.crowd[held]
    boxes = annotations.boxes[held][counts].astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, [0, 2]] += shift
    labels = np.array(dataset.category_ids)[annotations.labels[held][counts]]
    image = dataset.images[image_id]
    return Detections(boxes, np.ones(len(boxes), np.float32), labels, 0, (image.height, image.width))


def test_perfect_detections_have_ap_1(toy_dataset: CocoFolder, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(toy_dataset, {image_id: perfect(toy_dataset, image_id) for image_id in toy_dataset.image_ids})
    assert (result.ap, result.ap50, result.ap75, result.aps) == pytest.approx((1, 1, 1, 1))
    assert math.isnan(result.apm)
    assert math.isnan(result.apl)
    assert result.images == len(toy_dataset) == 4
    assert result.to_json()["apl"] is None
    assert capsys.readouterr().out == ""


def test_shifted_boxes_lose_the_stricter_thresholds(toy_dataset: CocoFolder) -> None:
    # A cell is 24 pixels wide: moved by 6, IoU is 18 / 30 = 0.6, which passes the thresholds 0.50, 0.55 and 0.60.
    moved = {image_id: perfect(toy_dataset, image_id, shift=6) for image_id in toy_dataset.image_ids}
    result = evaluate(toy_dataset, moved)
    assert result.ap == pytest.approx(0.3)
    assert (result.ap50, result.ap75) == pytest.approx((1, 0))


def test_no_detections_at_all(toy_dataset: CocoFolder) -> None:
    nothing = {
        image_id: perfect(toy_dataset, image_id).select(np.zeros(0, np.int64)) for image_id in toy_dataset.image_ids
    }
    assert evaluate(toy_dataset, nothing).ap == 0


def test_only_the_given_images_count(toy_dataset: CocoFolder) -> None:
    first, second, *_ = toy_dataset.image_ids
    found = {first: perfect(toy_dataset, first), second: perfect(toy_dataset, second).select(np.zeros(0, np.int64))}
    assert evaluate(toy_dataset, {first: found[first]}).ap == pytest.approx(1)
    assert evaluate(toy_dataset, found).ap < 1


def test_session_finds_the_bright_cells(toy_dataset: CocoFolder) -> None:
    calls: list[tuple[int, int]] = []
    result, detections = evaluate_session(
        ToySession(), toy_dataset, batch_size=3, progress=lambda done, count: calls.append((done, count))
    )
    assert result.ap == pytest.approx(1)
    assert tuple(detections) == toy_dataset.image_ids
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_coco_records_give_width_and_height() -> None:
    found = Detections(
        np.array([[1, 2, 4, 8]], np.float32), np.array([0.5], np.float32), np.array([3], np.int64), 0, (9, 9)
    )
    expected = {"image_id": 7, "category_id": 3, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5}
    assert coco_records(7, found) == [expected]


def test_without_objects_there_is_nothing_to_measure(toy_dataset: CocoFolder) -> None:
    path = toy_dataset.annotations_path
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    with pytest.raises(ValueError, match="no objects in the 4 images to evaluate"):
        evaluate_session(ToySession(), open_coco(path.parents[1]))


def test_the_last_missing_image_is_found_before_the_first_runs(toy_dataset: CocoFolder) -> None:
    toy_dataset.path(4).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 images .* the first is 4\.png"):
        evaluate_session(ToySession(), toy_dataset, progress=lambda done, count: pytest.fail("an image was run"))


def test_detections_that_are_not_numbers_have_no_ap(toy_dataset: CocoFolder) -> None:
    found = {image_id: perfect(toy_dataset, image_id) for image_id in toy_dataset.image_ids}
    found[2].boxes[0, 0] = np.nan
    with pytest.raises(ValueError, match="detections of image 2 are not numbers"):
        evaluate(toy_dataset, found)


def test_annotations_of_photographs_evaluate_to_1(coco_tiny: Path) -> None:
    dataset = open_coco(coco_tiny)
    assert len(dataset.category_ids) == 80
    result = evaluate(dataset, {image_id: perfect(dataset, image_id) for image_id in dataset.image_ids})
    assert (result.ap, result.aps, result.apm, result.apl) == pytest.approx((1, 1, 1, 1))
    assert dataset.load(dataset.image_ids[0]).mode == "RGB"


def test_classes_and_their_recall(toy_dataset: CocoFolder) -> None:
    found = {image_id: perfect(toy_dataset, image_id) for image_id in toy_dataset.image_ids}
    first = toy_dataset.category_ids[0]
    without = {image_id: one.select(one.labels != first) for image_id, one in found.items()}
    result = evaluate(toy_dataset, without)
    counts = np.bincount(toy_dataset.annotations.labels, minlength=3)
    assert [(one.name, one.ap, one.ar) for one in result.classes if one.objects] == [
        (name, pytest.approx(float(place > 0)), pytest.approx(float(place > 0)))
        for place, name in enumerate(toy_dataset.category_names)
        if counts[place]
    ]
    assert [one.objects for one in result.classes] == counts.tolist()
    assert result.ar == pytest.approx(np.mean(np.arange(3)[counts > 0] > 0))
    assert result.to_json()["classes"][0]["name"] == toy_dataset.category_names[0]
    assert evaluate(toy_dataset, found, max_detections=1).ar < evaluate(toy_dataset, found).ar == pytest.approx(1)
