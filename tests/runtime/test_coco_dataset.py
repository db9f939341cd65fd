from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from asag.runtime.coco_dataset import CocoFolder, open_coco
from asag.runtime.coco_evaluation import evaluate_session
from tests.runtime.coco_files import entry, write_split
from tests.runtime.toy_detector import ToySession, toy_metadata


def test_image_of_another_size_is_refused(toy_dataset: CocoFolder) -> None:
    Image.new("RGB", (10, 10)).save(toy_dataset.path(1))
    with pytest.raises(ValueError, match=r"is 10 x 10 pixels, but .* says 96 x 64"):
        toy_dataset.load(1)
    with pytest.raises(ValueError, match="another picture"):
        toy_dataset.check_images(toy_dataset.image_ids)


def test_wrong_folders_name_what_was_looked_for(toy_dataset: CocoFolder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dataset not found"):
        open_coco(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"looked for annotations/instances_val2017\.json .* val2017/_annot"):
        open_coco(tmp_path)
    root = toy_dataset.images_dir.parent
    with pytest.raises(FileNotFoundError, match=r"no split test2017"):
        open_coco(root, "test2017")
    with pytest.raises(FileNotFoundError, match="no annotations: looked for"):
        CocoFolder(root, root / "none.json")


@pytest.mark.parametrize(
    "metadata",
    [
        toy_metadata(category_ids=(1, 2, 3)),
        toy_metadata(category_names=("ring", "square", "circle")),
        toy_metadata(category_names=("a", "b", "c")),
    ],
)
def test_other_classes_are_refused_with_both_lists(toy_dataset: CocoFolder, metadata: object) -> None:
    with pytest.raises(ValueError, match=r"the model's classes are 3: .*; those of .* are 3: 1 circle, 3 square, 7"):
        evaluate_session(ToySession(metadata), toy_dataset)  # type: ignore[arg-type]


def test_chosen_classes_are_matched_by_name(toy_dataset: CocoFolder) -> None:
    session = ToySession(toy_metadata(category_names=("circle", "square", "star")))
    result, _ = evaluate_session(session, toy_dataset, classes=("square", "circle"))
    assert result.ap == pytest.approx(1)
    only = toy_dataset.for_model(session.metadata, ("square",))
    assert (only.category_ids, only.category_names) == ((3,), ("square",))
    assert len(only.annotations.boxes) < len(toy_dataset.annotations.boxes)
    with pytest.raises(ValueError, match="no class 'ring' in both"):
        evaluate_session(session, toy_dataset, classes=("ring",))
    # The same names under other numbers: the detections' labels are the model's.
    renamed = toy_dataset.with_classes((9, 8, 4), ("ring", "square", "circle"), "theirs", ("circle", "ring", "square"))
    assert (renamed.category_ids, renamed.category_names) == ((4, 8, 9), ("circle", "square", "ring"))
    assert renamed.category_id(9) == 7


def test_what_does_not_count_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_split(tmp_path, [entry(), entry(box=(1, 1, 0, 3))])
    open_coco(tmp_path)
    assert "1 images with 1 objects; left out: 1 bad boxes" in caplog.text


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("val2017/1.png", "1.png is there, so take"),
        (r"C:\own\1.png", "1.png is there"),
        ("1.PNG", "one of that name is there, but in other case"),
        ("caf\u00e9.png", "one of that name is there, but in other case or with accents"),
        ("2.png", "complete them"),
    ],
)
def test_a_missing_picture_comes_with_what_to_do(tmp_path: Path, name: str, remedy: str) -> None:
    path = write_split(tmp_path, [entry()])
    (tmp_path / "val2017" / "cafe\u0301.png").touch()
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = name
    path.write_text(json.dumps(content))
    folder = open_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"1 of 1 images .*: {remedy}"):
        folder.check_images(folder.image_ids)


def test_pictures_as_stored(tmp_path: Path) -> None:
    path = write_split(tmp_path, [entry()])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "val2017" / "1.png", exif=exif)
    with pytest.raises(ValueError, match=r"40 x 60 pixels.*EXIF orientation turns the picture"):
        CocoFolder(path.parents[1] / "val2017", path).load(1)
    assert CocoFolder(path.parents[1] / "val2017", path, stored_pixels=True).load(1).size == (60, 40)
