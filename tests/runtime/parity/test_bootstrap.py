from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.coco_evaluation import evaluate, evaluate_with_matches
from asag.runtime.files import write_json
from asag.runtime.parity.bootstrap import average_precision, draw_weights, interval
from asag.runtime.postprocessing import Detections
from tests.runtime.toy_detector import ToySession, write_toy_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> CocoFolder:
    return write_toy_dataset(tmp_path / "data", images=12, seed=3)


@pytest.fixture
def detections(dataset: CocoFolder) -> dict[int, Detections]:
    """Wrong and shifted boxes, and scores with ties between images, so that AP is far from 0 and 1."""
    generator = np.random.default_rng(5)
    found = {}
    for image_id in dataset.image_ids:
        (result,) = ToySession().detect([dataset.load(image_id)])
        boxes = result.boxes + generator.normal(0, 1.5, result.boxes.shape).astype(np.float32)
        scores = np.round(result.scores + generator.normal(0, 0.3, len(result)), 1) + np.arange(len(result)) * 1e-3
        found[image_id] = Detections(boxes, scores.astype(np.float32), result.labels, 0, result.image_size)
    return found


def test_each_image_once_is_the_plain_result(dataset: CocoFolder, detections: dict[int, Detections]) -> None:
    result, matches = evaluate_with_matches(dataset, detections)
    assert 0.05 < result.ap < 0.95
    assert average_precision(matches, np.ones((2, 12))) == pytest.approx([result.ap] * 2, abs=1e-12)
    assert evaluate(dataset, detections) == result


@pytest.mark.parametrize("seed", range(4))
def test_left_out_images_are_as_if_never_evaluated(
    dataset: CocoFolder, detections: dict[int, Detections], seed: int
) -> None:
    _, matches = evaluate_with_matches(dataset, detections)
    kept = np.random.default_rng(seed).random(12) < 0.5
    part = {image_id: detections[image_id] for image_id, keep in zip(sorted(detections), kept, strict=True) if keep}
    assert average_precision(matches, kept[None].astype(float)) == pytest.approx(
        [evaluate(dataset, part).ap], abs=1e-12
    )


def test_an_image_drawn_twice_is_as_if_it_were_there_twice(
    dataset: CocoFolder, detections: dict[int, Detections], tmp_path: Path
) -> None:
    _, matches = evaluate_with_matches(dataset, detections)
    weights = draw_weights(12, 3, seed=7)
    content = json.loads(dataset.annotations_path.read_text())
    images = {image["id"]: image for image in content["images"]}
    for row in weights.astype(int):
        repeated = {"categories": copy.deepcopy(content["categories"]), "images": [], "annotations": []}
        found = {}
        for image_id, times in zip(sorted(detections), row, strict=True):
            for copy_number in range(times):
                new_id = image_id * 100 + copy_number
                repeated["images"].append({**images[image_id], "id": new_id, "file_name": f"{new_id}.png"})
                for annotation in content["annotations"]:
                    if annotation["image_id"] == image_id:
                        number = len(repeated["annotations"]) + 1
                        repeated["annotations"].append({**annotation, "id": number, "image_id": new_id})
                found[new_id] = detections[image_id]
        path = tmp_path / "repeated.json"
        write_json(path, repeated)
        expected = evaluate(CocoFolder(dataset.images_dir, path), found).ap
        assert average_precision(matches, row[None].astype(float)) == pytest.approx([expected], abs=1e-12)


def test_the_interval_is_repeatable_and_holds_the_value(dataset: CocoFolder, detections: dict[int, Detections]) -> None:
    result, matches = evaluate_with_matches(dataset, detections)
    first = interval(average_precision(matches, draw_weights(12)))
    assert first is not None
    assert first == interval(average_precision(matches, draw_weights(12)))
    assert first.low < result.ap < first.high
    assert interval(np.full(3, np.nan)) is None
    assert np.isnan(average_precision([], np.ones((1, 12)))).all()
