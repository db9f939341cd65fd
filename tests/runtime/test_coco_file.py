from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.coco_evaluation import evaluate
from asag.runtime.coco_file import read_coco_file
from asag.runtime.postprocessing import Detections
from tests.runtime.coco_files import CATEGORIES, entry, image_entry, write_split

PLAIN = [entry(1, (1, 2, 10, 20)), entry(1, (30, 5, 20, 20), 7), entry(2, (0, 0, 60, 40))]
IMAGES = [image_entry(1), image_entry(2)]


def perfect_ap(path: Path) -> float:
    """AP of the objects that the reader found, as detections."""
    folder = CocoFolder(path.parents[1] / "val2017", path)
    found = {}
    for image_id, image in folder.images.items():
        held = folder.objects(image_id)
        real = ~folder.annotations.crowd[held]
        boxes = folder.annotations.boxes[held][real]
        boxes = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1).astype(np.float32)
        labels = np.array(folder.category_ids)[folder.annotations.labels[held][real]]
        found[image_id] = Detections(boxes, np.ones(len(boxes), np.float32), labels, 0, (image.height, image.width))
    return evaluate(folder, found).ap


@pytest.mark.parametrize("ids", [range(3), [1, 1, 1], [0, 0, 0], [None] * 3, ["a", "b", "c"], [10**30, -5, 0]])
def test_ids_of_annotations_never_matter(tmp_path: Path, ids: Any) -> None:
    path = write_split(tmp_path, [{**one, "id": number} for one, number in zip(PLAIN, ids, strict=True)], IMAGES)
    assert len(read_coco_file(path).boxes) == 3
    assert perfect_ap(path) == pytest.approx(1)


@pytest.mark.parametrize("name", ["iscrowd", "ignore"])
@pytest.mark.parametrize("value", [None, 0, 0.0, False])
def test_flags_that_are_off(tmp_path: Path, name: str, value: Any) -> None:
    path = write_split(tmp_path, [{**one, name: value} for one in PLAIN], IMAGES)
    assert not read_coco_file(path).crowd.any()


@pytest.mark.parametrize("name", ["iscrowd", "ignore"])
def test_regions_to_ignore_cost_nothing(tmp_path: Path, name: str) -> None:
    path = write_split(tmp_path, [*PLAIN, entry(1, (5, 5, 50, 30), **{name: 1})], IMAGES)
    assert read_coco_file(path).crowd.tolist() == [False, False, True, False]
    assert perfect_ap(path) == pytest.approx(1)


@pytest.mark.parametrize("area", [None, "many", -3, 0, 1e12, float("nan"), 10**400, [4]])
def test_areas_that_cannot_be_become_the_box_s(tmp_path: Path, area: Any) -> None:
    path = write_split(tmp_path, [{**PLAIN[0], "area": area}])
    assert read_coco_file(path).areas.tolist() == [200]
    assert perfect_ap(path) == pytest.approx(1)


@pytest.mark.parametrize(
    "box",
    [
        [5, 5, 0, 4],
        [5, 5, -3, 4],
        [float("nan"), 1, 2, 2],
        [100, 0, 5, 5],
        [1, 2, 3],
        [-9, 0, 5, 5],
        [10**400, 0, 1, 1],
        [True, 0, 1, 1],
        [[1], 0, 1, 1],
        [10, 10, 1e-10, 5],
        [59.9999999, 0, 5, 5],
        [0, 0, 1e308, 5],
    ],
)
def test_bad_boxes_are_left_out_and_counted(tmp_path: Path, box: Any) -> None:
    path = write_split(tmp_path, [*PLAIN, entry(1, box), {"image_id": 1, "category_id": 2, "bbox": "1 2 3 4"}], IMAGES)
    found = read_coco_file(path)
    assert (len(found.boxes), found.left_out.bad_boxes, found.left_out.wrong) == (3, 2, True)
    assert perfect_ap(path) == pytest.approx(1)


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    assert len(read_coco_file(write_split(tmp_path, PLAIN, IMAGES, encoding="utf-8-sig")).boxes) == 3


def test_only_true_repetitions_are_left_out(tmp_path: Path) -> None:
    twice = [{**PLAIN[0], "id": 4}, {**PLAIN[0], "id": 4}, {**PLAIN[0], "id": 5}, {**PLAIN[1], "id": 4}, PLAIN[2]]
    found = read_coco_file(write_split(tmp_path, twice, [*IMAGES, IMAGES[0]]))
    assert (len(found.boxes), len(found.images)) == (4, 2)
    assert (found.left_out.repeated_annotations, found.left_out.repeated_images) == (1, 1)


def test_a_picture_under_two_ids_is_one_image(tmp_path: Path) -> None:
    images = [image_entry(1, "./a.png"), image_entry(2, "b.png"), image_entry(3, "../val2017//a.png")]
    again = [entry(3, (40, 30, 5, 5)), {**PLAIN[0], "image_id": 3}]
    path = write_split(tmp_path, [*PLAIN, *again], images)
    found = read_coco_file(path)
    assert len(found.images) == 3, "their folder is not known here"
    with pytest.raises(ValueError, match=r"a\.png and \.\./val2017/a\.png are one picture: keep one name"):
        CocoFolder(path.parents[1] / "val2017", path)
    path = write_split(tmp_path, [*PLAIN, *again], [*images[:2], image_entry(3, "a.png")])
    found = read_coco_file(path)
    assert [image.file_name for image in found.images] == ["a.png", "b.png"]
    assert found.places.tolist() == [0, 0, 0, 1]
    assert (found.left_out.merged_images, found.left_out.repeated_annotations) == (1, 1)
    assert perfect_ap(path) == pytest.approx(1)


def test_ids_may_be_text_or_of_two_kinds(tmp_path: Path) -> None:
    path = write_split(
        tmp_path,
        [entry("one", (1, 1, 5, 5), "c"), entry("2", (1, 1, 5, 5), "d")],
        [image_entry("one"), image_entry(2)],
        [{"id": "c", "name": "cat"}, {"id": "d", "name": "dog"}],
    )
    folder = CocoFolder(path.parents[1] / "val2017", path)
    assert (folder.image_ids, folder.category_ids) == (("one", 2), (1, 2))
    assert folder.category_id(2) == "d"
    assert perfect_ap(path) == pytest.approx(1)


@pytest.mark.parametrize("root", ["pets", "cat"])
def test_the_root_category_of_a_labelling_tool_is_no_class(tmp_path: Path, root: str) -> None:
    categories = [
        {"id": 0, "name": root, "supercategory": "none"},
        *({**category, "supercategory": root} for category in CATEGORIES),
    ]
    found = read_coco_file(write_split(tmp_path, PLAIN, IMAGES, categories))
    assert [category.name for category in found.categories] == ["cat", "dog"]
    assert found.left_out.root_categories == (root,)
    with_objects = write_split(tmp_path, [*PLAIN, entry(1, category_id=0)], IMAGES, categories)
    if root == "pets":
        assert len(read_coco_file(with_objects).categories) == 3
    else:
        with pytest.raises(ValueError, match="the categories 0 and 2 are both named 'cat'"):
            read_coco_file(with_objects)


CLASS_A = {"id": 1, "name": "a"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "cannot read .* as JSON"),
        ("[" * 100_000, "cannot read .* as JSON"),
        ([], "not a COCO annotation file: it has no list 'images'"),
        ({"categories": None}, "no list 'categories'"),
        ({"images": [{"id": 1}]}, r"images\[0\] has no proper file_name"),
        ({"images": [image_entry(True)]}, r"images\[0\] has no proper id"),
        ({"images": [image_entry(width="4")]}, r"images\[0\] has no proper width"),
        ({"images": [image_entry(width=10**400)]}, r"images\[0\] has no proper width"),
        ({"images": [image_entry(height=float("nan"))]}, r"images\[0\] has no proper height"),
        ({"images": []}, "holds no images"),
        ({"images": [image_entry(1, "a"), image_entry(1, "b")]}, "the image id 1 is used twice, for a and b"),
        ({"images": [image_entry(1, "a"), image_entry(2, "a", 41)]}, "a is listed with two sizes"),
        ({"categories": []}, "names no categories"),
        ({"categories": [{"id": 1}]}, r"categories\[0\] has no proper name"),
        ({"categories": [{"id": 1, "name": "\t"}]}, r"categories\[0\] has no proper name"),
        ({"categories": [{"id": 1, "name": "\ud800"}]}, r"categories\[0\] has no proper name"),
        ({"categories": [CLASS_A, {"id": 1 << 63, "name": "b"}]}, r"categories\[1\] has no proper id"),
        ({"categories": [CLASS_A, {"id": 1, "name": "b"}]}, "the category id 1 is used twice, for 'a' and 'b'"),
        ({"categories": [CLASS_A, {"id": 3, "name": " a"}]}, "the categories 1 and 3 are both named"),
        ({"annotations": [7]}, r"annotations\[0\] has no proper image_id"),
        ({"annotations": [entry(category_id=3)]}, r"annotations\[0\] has an unknown category 3"),
        (
            {"annotations": [entry(category_id=1, iscrowd="no")]},
            r"annotations\[0\] has iscrowd 'no'; it must be 0 or 1",
        ),
    ],
)
def test_what_cannot_be_decided_is_one_line(tmp_path: Path, content: Any, message: str) -> None:
    plain = {"images": [image_entry()], "annotations": [entry(category_id=1)], "categories": [CLASS_A]}
    path = tmp_path / "file.json"
    path.write_text(content if isinstance(content, str) else json.dumps(plain | content if content else content))
    with pytest.raises(ValueError, match=message) as caught:
        read_coco_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.sampled_from(["", "1", "one", "猫", "e\u0301", "\u0000", "9" * 400]),
    st.lists(st.integers(-5, 99), max_size=5),
    st.dictionaries(st.sampled_from(["id", "x"]), st.integers(), max_size=1),
)


@st.composite
def coco_files(draw: st.DrawFn) -> dict[str, Any]:
    """A good file in which some fields are missing or something else, and some entries repeated."""
    images = [image_entry(number, height=50, width=80) for number in range(1, draw(st.integers(1, 3)) + 1)]
    sides, places = st.sampled_from([1, 7.5, 20, 60]), st.sampled_from([-4, 0, 3.25, 40, 90])
    annotations = [
        entry(
            draw(st.integers(1, 4)), draw(st.tuples(places, places, sides, sides)), draw(st.sampled_from([2, 7])), id=i
        )
        for i in range(draw(st.integers(0, 6)))
    ]
    content: dict[str, Any] = {
        "images": images,
        "annotations": annotations,
        "categories": [dict(category) for category in CATEGORIES],
    }
    fields = [
        "id",
        "file_name",
        "height",
        "width",
        "image_id",
        "category_id",
        "bbox",
        "area",
        "iscrowd",
        "ignore",
        "name",
    ]
    for _ in range(draw(st.integers(0, 3))):
        section = content[draw(st.sampled_from(sorted(content)))]
        if not section:
            continue
        place, field = draw(st.integers(0, len(section) - 1)), draw(st.sampled_from(fields))
        kind = draw(st.sampled_from(["other", "missing", "repeat", "replace"]))
        if kind == "repeat":
            section.append(section[place])
        elif kind == "replace":
            section[place] = draw(ODD)
        elif isinstance(section[place], dict):
            section[place] = {key: value for key, value in section[place].items() if key != field}
            if kind == "other":
                section[place][field] = draw(ODD)
    return content


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=coco_files())
def test_any_file_evaluates_perfect_detections_to_1_or_is_one_line(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "val2017").mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    try:
        found = read_coco_file(path)
    except ValueError as error:
        message = str(error)
        assert message.startswith((str(path), f"cannot read {path}"))
        assert "\n" not in message
        return
    ap = perfect_ap(path)
    assert np.isnan(ap) if found.crowd.all() else ap == pytest.approx(1)


def test_boxes_in_other_units_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fractions = write_split(tmp_path / "a", [entry(1, (0.1, 0.2, 0.5, 0.5)), entry(2, (0, 0, 1, 1))], IMAGES)
    with pytest.raises(ValueError, match="they look like fractions of the image"):
        read_coco_file(fractions)
    corners = write_split(tmp_path / "b", [entry(1, (20 + i, 10, 58, 39)) for i in range(10)])
    with pytest.raises(ValueError, match=r"100% of the boxes reach out .* they look like x1, y1, x2, y2"):
        read_coco_file(corners)
    few = write_split(tmp_path / "c", [entry(1, (20 + i, 10, 58, 39)) for i in range(9)])
    assert len(read_coco_file(few).boxes) == 9
    assert "they look like x1, y1, x2, y2" in caplog.text
