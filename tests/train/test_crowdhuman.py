import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from asag.cli.data import data
from asag.runtime.coco_dataset import open_coco
from asag.runtime.postprocessing import Detections
from asag.train.crowdhuman import convert_crowdhuman
from asag.train.crowdhuman_evaluation import (
    REFERENCE_RATES,
    ImageCase,
    average_precision,
    evaluate_crowdhuman,
    log_average_miss_rate,
    match_detections,
    measure,
)
from asag.train.dataset import open_training_split

FAR, NEAR, OTHER = [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]


def case(objects=(), ignored=(), boxes=(), scores=()):
    def as_boxes(values):
        return np.asarray(values, float).reshape(-1, 4)

    return ImageCase(as_boxes(objects), as_boxes(ignored), as_boxes(boxes), np.asarray(scores, float))


def test_detections_take_the_best_free_object_by_falling_score():
    # The second box fits the object better, but the first one scores higher and has taken it.
    kept, hits = match_detections(case([FAR], boxes=[[0, 0, 10, 9], FAR, NEAR], scores=[0.9, 0.8, 0.95]))
    assert kept.tolist() == [2, 0, 1]
    assert hits.tolist() == [False, True, False]


def test_an_overlap_of_one_half_is_not_enough():
    assert match_detections(case([FAR], boxes=[[0, 0, 10, 5]], scores=[1]))[1].tolist() == [False]
    assert match_detections(case([FAR], boxes=[[0, 0, 10, 5.01]], scores=[1]))[1].tolist() == [True]


def test_regions_to_ignore_swallow_any_number_of_detections():
    crowd = [100, 0, 200, 50]
    inside, half = [110, 10, 120, 20], [195, 0, 205, 10]
    kept, hits = match_detections(
        case([FAR], [crowd], [inside, inside, half, FAR, [100, 0, 200, 50]], [0.9, 0.8, 0.7, 0.6, 0.5])
    )
    assert kept.tolist() == [2, 3]  # exactly one half inside is not more than one half
    assert hits.tolist() == [False, True]
    # An object inside a region is found first; only the second detection of it is swallowed.
    kept, hits = match_detections(case([inside], [crowd], [inside, inside], [0.9, 0.8]))
    assert (kept.tolist(), hits.tolist()) == ([0], [True])


def test_perfect_detections():
    result = measure(
        [case([FAR, NEAR], boxes=[FAR, NEAR], scores=[0.9, 0.8]), case([OTHER], boxes=[OTHER], scores=[1])]
    )
    assert (result.ap, result.recall, result.objects, result.images) == (1.0, 1.0, 3, 2)
    assert result.log_average_miss_rate == pytest.approx(1e-10)


def test_a_case_by_hand():
    # By falling score: hit, miss, hit, miss; 4 objects in 2 images.
    cases = [
        case([FAR, NEAR, OTHER], boxes=[FAR, [60, 0, 70, 10]], scores=[0.9, 0.8]),
        case([FAR], boxes=[FAR, [60, 0, 70, 10]], scores=[0.7, 0.6]),
    ]
    result = measure(cases)
    # Recall 1/4, 1/4, 2/4, 2/4 with precision 1, 1/2, 2/3, 1/2.
    assert result.ap == pytest.approx(0.25 * 1 + 0.25 * (1 / 2 + 2 / 3) / 2)
    assert result.recall == 0.5
    # False positives per image 0, 1/2, 1/2, 1: up to a rate under 1/2 a quarter is found, from there on one half.
    rates = [10 ** (-2 + step / 4) for step in range(9)]
    missed = [0.75 if rate < 0.5 else 0.5 for rate in rates]
    assert sum(value == 0.5 for value in missed) == 2
    assert result.log_average_miss_rate == pytest.approx(np.prod(missed) ** (1 / 9))


def test_the_miss_rate_is_whole_where_the_first_detection_exceeds_the_rate():
    assert REFERENCE_RATES[[0, -1]].tolist() == [0.01, 1.0]
    assert log_average_miss_rate(np.array([0.0, 0.8]), np.array([1.5, 1.5])) == 1.0
    assert log_average_miss_rate(np.array([]), np.array([])) == 1.0
    assert log_average_miss_rate(np.array([0.0, 0.8]), np.array([1.0, 1.0])) == pytest.approx(0.2 ** (1 / 9))


def test_nothing_to_find_or_nothing_found():
    assert average_precision(np.array([]), np.array([]), 3) == 0
    nothing_found = measure([case([FAR])])
    assert (nothing_found.ap, nothing_found.recall, nothing_found.log_average_miss_rate) == (0, 0, 1)
    nothing_there = measure([case(boxes=[FAR], scores=[1])])
    assert np.isnan(nothing_there.ap)
    assert nothing_there.to_json()["ap"] is None


@pytest.fixture
def odgt(tmp_path):
    """CrowdHuman's layout: annotation files and Images/."""
    source = tmp_path / "source"
    (source / "Images").mkdir(parents=True)
    records = {
        "train": [("1,a", (80, 60)), ("2,b", (60, 80))],
        "val": [("3,c", (80, 60))],
    }
    for split, images in records.items():
        lines = []
        for name, size in images:
            Image.new("RGB", size).save(source / "Images" / f"{name}.jpg")
            boxes = [
                {"tag": "person", "fbox": [-5, 10, 30, 40], "hbox": [0, 0, 5, 5], "extra": {"box_id": 0}},
                {"tag": "person", "fbox": [40, 10, 10, 20], "extra": {"ignore": 1}},
                {"tag": "mask", "fbox": [50, 0, 9, 9], "extra": {"ignore": 1}},
            ]
            lines.append(json.dumps({"ID": name, "gtboxes": boxes}))
        (source / f"annotation_{split}.odgt").write_text("\n".join(lines) + "\n")
    return source


def test_conversion(odgt, tmp_path):
    seen = []
    files = [odgt / "annotation_train.odgt", odgt / "annotation_val.odgt"]
    output = tmp_path / "converted"
    for _ in range(2):  # a second time over the first
        converted = convert_crowdhuman(files, output, progress=lambda done, total: seen.append((done, total)))
    assert [(split.images, split.persons, split.ignored) for split in converted] == [(2, 2, 4), (1, 1, 2)]
    assert seen[:3] == [(1, 3), (2, 3), (3, 3)]
    dataset = open_training_split(output)
    assert dataset.category_names == ("person",)
    assert dataset.counts.objects == 2
    assert dataset.counts.crowd_annotations == 4
    assert dataset.image_size(1) == (80, 60)
    assert dataset[0][1]["boxes"].tolist() == [[0, 10, 25, 50]]
    # Detections are judged with the object clipped to the image too, and the ignored person costs nothing.
    validation = open_coco(output)
    boxes = np.array([[0, 10, 25, 50], [40, 10, 50, 30]], np.float32)
    found = Detections(boxes, np.array([0.5, 0.9], np.float32), np.ones(2, np.int64), 0, (60, 80))
    result = evaluate_crowdhuman(validation, {1: found})
    assert (result.ap, result.recall, result.objects) == (1.0, 1.0, 1)


def test_the_command(odgt, tmp_path):
    files = [str(odgt / "annotation_train.odgt"), str(odgt / "annotation_val.odgt")]
    result = CliRunner().invoke(data, ["crowdhuman", *files, "-o", str(tmp_path / "converted")])
    assert result.exit_code == 0, result.output
    assert "2 images, 2 persons, 4 regions to ignore" in " ".join(result.output.split())
    assert open_training_split(tmp_path / "converted").counts.images == 2


def test_what_cannot_be_converted_is_named(odgt, tmp_path):
    train = odgt / "annotation_train.odgt"
    with pytest.raises(FileNotFoundError, match="not found"):
        convert_crowdhuman([odgt / "annotation_val2.odgt"], tmp_path / "out")
    with pytest.raises(ValueError, match="which split"):
        convert_crowdhuman([odgt / "annotation.odgt"], tmp_path / "out")
    with pytest.raises(ValueError, match="one split"):
        convert_crowdhuman([train, train], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"1,a\.jpg .*--images"):
        convert_crowdhuman([train], tmp_path / "out", images=tmp_path)
    for line, message in (
        ("{", "Expecting"),
        ('{"ID": "1,a", "gtboxes": [{"fbox": [1, 2]}]}', "four numbers"),
        ("3", ""),
    ):
        train.write_text('{"ID": "1,a"}\n' + line + "\n")
        with pytest.raises(ValueError, match=rf"line 2 is not a CrowdHuman record.*{message}"):
            convert_crowdhuman([train], tmp_path / "out")
    assert not (tmp_path / "out").exists()
