from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.coco_evaluation import CocoFolder, coco_records, evaluate, evaluate_session, open_coco
from runtime.postprocessing import Detections
from tests.runtime.toy_detector import ToySession, toy_metadata


def perfect(dataset: CocoFolder, image_id: int, shift: float = 0.0) -> Detections:
    """The annotated objects as detections, moved right by ``shift`` pixels."""
    annotations = [
        annotation
        for annotation in dataset.coco.loadAnns(dataset.coco.getAnnIds(imgIds=[image_id]))
        if not annotation["iscrowd"]
    ]
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, [0, 2]] += shift
    labels = np.array([annotation["category_id"] for annotation in annotations], np.int64)
    record = dataset.images[image_id]
    scores = np.ones(len(boxes), np.float32)
    return Detections(boxes, scores, labels, 0, (record["height"], record["width"]))


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


def test_model_of_other_classes_is_refused(toy_dataset: CocoFolder) -> None:
    session = ToySession(toy_metadata(category_ids=(1, 2, 3)))
    with pytest.raises(ValueError, match=r"3: 1 circle, 2 square, 3 ring.*3: 1 circle, 3 square, 7 ring"):
        evaluate_session(session, toy_dataset)


def test_image_of_another_size_is_refused(toy_dataset: CocoFolder) -> None:
    path = toy_dataset.path(1)
    Image.new("RGB", (10, 10)).save(path)
    with pytest.raises(ValueError, match=r"is 10x10, but .* says 96x64"):
        toy_dataset.load(1)


def test_wrong_folders_name_what_was_looked_for(toy_dataset: CocoFolder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dataset not found"):
        open_coco(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"looked for .*instances_val2017\.json"):
        open_coco(tmp_path)
    root = toy_dataset.images_dir.parent
    with pytest.raises(FileNotFoundError, match=r"no COCO split test2017"):
        open_coco(root, "test2017")
    with pytest.raises(FileNotFoundError, match="no annotations: looked for"):
        CocoFolder(root, root / "none.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", "cannot read .* as JSON"),
        ([], "not a COCO detection file"),
        ({"images": 3}, "looked for the lists images, categories, annotations"),
        ({"categories": []}, "names no categories"),
        ({"categories": [{"id": 1}]}, r"categories\[0\] has no proper name"),
        ({"images": [{"id": 1, "file_name": "a", "height": 3, "width": "4"}]}, r"images\[0\] has no proper width"),
        ({"annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3]}]}, "no bbox of four numbers"),
        ({"annotations": [7]}, r"annotations\[0\] has no proper image_id"),
        ({"categories": [{"id": 1, "name": "a"}] * 2}, "the id 1 appears twice in categories"),
    ],
)
def test_damaged_annotations(change: object, message: str, toy_dataset: CocoFolder) -> None:
    path = toy_dataset.annotations_path
    content = json.loads(path.read_text())
    path.write_text(change if isinstance(change, str) else json.dumps(content | change if change else change))
    with pytest.raises(ValueError, match=message) as caught:
        open_coco(path.parents[1])
    assert "\n" not in str(caught.value)


def test_optional_fields_may_be_missing(toy_dataset: CocoFolder) -> None:
    path = toy_dataset.annotations_path
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        del annotation["id"], annotation["area"], annotation["iscrowd"]
    path.write_text(json.dumps(content))
    dataset = open_coco(path.parents[1])
    assert evaluate(dataset, {image_id: perfect(dataset, image_id) for image_id in dataset.image_ids}).ap == (
        pytest.approx(1)
    )


def test_annotations_of_photographs_evaluate_to_1(coco_tiny: Path) -> None:
    dataset = open_coco(coco_tiny)
    assert len(dataset.category_ids) == 80
    result = evaluate(dataset, {image_id: perfect(dataset, image_id) for image_id in dataset.image_ids})
    assert (result.ap, result.aps, result.apm, result.apl) == pytest.approx((1, 1, 1, 1))
    assert dataset.load(dataset.image_ids[0]).mode == "RGB"
