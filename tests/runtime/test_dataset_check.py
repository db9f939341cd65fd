from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asag.runtime.dataset_check import check_dataset, equal_files, write_annotated_sheet
from asag.runtime.drawing import class_colour
from tests.runtime.coco_files import CATEGORIES, entry, image_entry, write_split


def paint(folder: Path) -> None:
    """Give the pictures of a folder different contents."""
    for number, path in enumerate(sorted(folder.iterdir())):
        size = Image.open(path).size
        Image.new("RGB", size, (number + 1, len(folder.name), 0)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sound splits: four images to train on, one of them without objects, and one to evaluate on."""
    objects = [entry(1, (1, 2, 10, 20)), entry(1, (0, 0, 60, 40)), entry(2, (0, 0, 60, 40), 7)]
    objects += [entry(4, (5, 5, 2, 9)), entry(1, (3, 3, 30, 30), iscrowd=1)]
    images = [image_entry(1), image_entry(2), image_entry(3), image_entry(4, None, 40, 600)]
    write_split(tmp_path, objects, images, split="train2017")
    write_split(tmp_path, [entry()], split="val2017")
    for split in ("train2017", "val2017"):
        paint(tmp_path / split)
    return tmp_path


def test_a_sound_data_set(folder: Path) -> None:
    found = check_dataset(folder)
    assert found.problems == ()
    assert found.compared == 5
    train, val = found.splits
    assert (train.name, train.images, train.objects, train.ignored) == ("train2017", 4, 4, 1)
    assert train.objects_of_class == {"cat": 3, "dog": 1}
    assert train.images_of_class == {"cat": 2, "dog": 1}
    assert val.objects_of_class == {"cat": 1, "dog": 0}
    assert train.images_without_objects == 1
    # 60 x 40 is medium. The box of 2 x 9 pixels is doubled at most: its image is 15 times as wide as high.
    assert (train.small, train.medium, train.large, train.tiny) == (2, 2, 0, 1)


def test_what_is_wrong_with_pictures(folder: Path) -> None:
    (folder / "train2017" / "1.png").unlink()
    (folder / "train2017" / "2.png").write_bytes(b"no picture")
    Image.new("RGB", (9, 9)).save(folder / "train2017" / "3.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (600, 40)).save(folder / "train2017" / "4.png", exif=exif)
    train = check_dataset(folder).splits[0]
    assert (train.missing, [*train.unreadable], train.other_size) == (("1.png",), ["2.png"], ("3.png", "4.png"))
    assert train.turned == 1
    assert len(check_dataset(folder).problems) == 3
    assert check_dataset(folder, stored_pixels=True).splits[0].other_size == ("3.png",)


def test_damage_behind_the_header_is_found_by_decoding(folder: Path) -> None:
    path = folder / "val2017" / "1.png"
    Image.effect_noise((60, 40), 50).convert("RGB").save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-500])
    assert check_dataset(folder).splits[1].unreadable == {}
    found = check_dataset(folder, decode=True)
    assert "truncated" in found.splits[1].unreadable["1.png"]
    assert found.problems[0].startswith("val2017: 1 pictures unreadable: ")
    assert str(path) in found.problems[0]


def test_equal_pictures(folder: Path) -> None:
    content = (folder / "train2017" / "1.png").read_bytes()
    (folder / "train2017" / "2.png").write_bytes(content)
    found = check_dataset(folder)
    assert found.duplicates_within == (("train2017: 1.png", "train2017: 2.png"),)
    (folder / "val2017" / "1.png").write_bytes(content)
    found = check_dataset(folder)
    assert found.duplicates_across == (("train2017: 1.png", "train2017: 2.png", "val2017: 1.png"),)
    assert found.duplicates_within == ()
    assert found.problems[0].startswith("1 pictures are there more than once across splits, such as train2017: 1.png =")


def test_files_of_one_length_are_compared_by_content(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abcd"]
    for path, content in zip(paths, ("one", "two", "one", "other"), strict=True):
        path.write_text(content)
    assert equal_files(paths) == [[0, 2]]


def test_categories_that_differ(folder: Path) -> None:
    write_split(folder, [entry()], categories=[{"id": 2, "name": "cat"}, {"id": 9, "name": "cow"}])
    paint(folder / "val2017")
    assert check_dataset(folder).problems == (
        "the categories of train2017 and val2017 differ: dog only in train2017; cow only in val2017",
    )
    write_split(folder, [entry()], categories=[CATEGORIES[0], {"id": 9, "name": "dog"}])
    paint(folder / "val2017")
    assert "1 under other ids, such as dog: 7 and 9" in check_dataset(folder).problems[0]


def test_annotations_that_do_not_count(folder: Path) -> None:
    write_split(folder, [entry(box=(1, 1, 0, 4))])
    paint(folder / "val2017")
    left_out, nothing = check_dataset(folder).problems
    assert "1 bad boxes" in left_out
    assert nothing == "val2017: no objects"


def test_the_sheet_shows_annotated_boxes(folder: Path) -> None:
    write_annotated_sheet(folder / "sheet.png", folder)
    with Image.open(folder / "sheet.png") as sheet:
        pixels = set(map(tuple, np.asarray(sheet.convert("RGB")).reshape(-1, 3).tolist()))
    assert {class_colour(0), class_colour(1), (128, 128, 128)} <= pixels
    with pytest.raises(ValueError, match=r"name it \.jpg or \.png"):
        write_annotated_sheet(folder / "sheet.txt", folder)
    for path in folder.glob("*/*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="no picture"):
        write_annotated_sheet(folder / "other.png", folder)


def test_ids_of_the_file_do_not_matter(folder: Path) -> None:
    path = folder / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["images"][0]["id"] = content["annotations"][0]["image_id"] = "one"
    path.write_text(json.dumps(content))
    assert check_dataset(folder).splits[1].objects == 1
