from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asag.runtime.coco_dataset import CocoFolder, clipped_boxes, open_coco
from asag.runtime.coco_evaluation import evaluate
from asag.runtime.dataset_check import check_dataset
from asag.runtime.layouts.find import find_split, find_splits
from asag.runtime.postprocessing import Detections
from tests.runtime import layouts
from tests.runtime.layouts import LAYOUTS, OBJECTS

Writer = Callable[[Path], None]


def seen(folder: CocoFolder) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    """Class and corners of what the folder holds, by image."""
    found = {}
    for image_id, image in folder.images.items():
        held = folder.objects(image_id)
        boxes = clipped_boxes(folder.annotations.boxes[held], image.height, image.width)
        names = [folder.category_names[label] for label in folder.annotations.labels[held]]
        assert (image.width, image.height) == layouts.SIDES
        found[Path(image.file_name).stem] = list(zip(names, map(tuple, boxes.round(6).tolist()), strict=True))
    return found


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_says_the_same(write: Writer, tmp_path: Path) -> None:
    write(tmp_path)
    for split in ("train", "val"):
        folder = open_coco(tmp_path, f"{split}2017")
        assert seen(folder) == OBJECTS[split]
        assert folder.category_names == layouts.NAMES
        assert not any(folder.annotations.left_out.reasons.values())
        folder.check_images(folder.image_ids)
    assert check_dataset(tmp_path).problems == ()


@pytest.mark.parametrize("write", LAYOUTS)
def test_perfect_detections_have_an_ap_of_1(write: Writer, tmp_path: Path) -> None:
    write(tmp_path)
    folder = open_coco(tmp_path)
    number = dict(zip(folder.category_names, folder.category_ids, strict=True))
    found = {}
    for image_id, image in folder.images.items():
        objects = OBJECTS["val"][Path(image.file_name).stem]
        boxes = np.array([box for _, box in objects], np.float32)
        labels = np.array([number[name] for name, _ in objects])
        found[image_id] = Detections(boxes, np.ones(len(boxes), np.float32), labels, 0, (image.height, image.width))
    assert evaluate(folder, found).ap == pytest.approx(1)


def test_the_only_split_stands_for_all(tmp_path: Path) -> None:
    layouts.only_split(tmp_path)
    assert seen(open_coco(tmp_path)) == OBJECTS["train"]


def test_unknown_and_ambiguous_folders(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"looked for .*instances_val2017\.json.*data\.yaml.*ImageSets/Main/val"
    ):
        find_split(tmp_path, "val2017")
    layouts.ultralytics(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no split minival .*, only train, val: looked for"):
        find_split(tmp_path, "minival")
    layouts.cvat(tmp_path)
    with pytest.raises(ValueError, match=r"the split train in two layouts, COCO \(.*\) and YOLO \(.*\)"):
        find_splits(tmp_path)
    assert seen(open_coco(tmp_path / "data.yaml")) == OBJECTS["val"], "a file that is named is no question"


def yolo(tmp_path: Path, line: str) -> CocoFolder:
    layouts.ultralytics(tmp_path)
    (tmp_path / "labels" / "val" / "d.txt").write_text(line)
    return open_coco(tmp_path)


def test_yolo_s_outlines_and_repeated_lines(tmp_path: Path) -> None:
    folder = yolo(tmp_path, "1 0.1 0.1 0.5 0.2 0.3 0.9\n0 0.5 0.5 1 1\n\n0 0.5 0.5 1 1\n0 0.5 0.5 0 1\n")
    assert seen(folder)["d"] == [("dog", (6.0, 4.0, 30.0, 36.0)), ("cat", (0.0, 0.0, 60.0, 40.0))]
    assert folder.annotations.left_out.repeated_annotations == 1
    assert folder.annotations.left_out.bad_boxes == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7 0.5 0.5 1 1", r"d\.txt, line 1: data\.yaml names no class 7"),
        ("0 0.5 0.5 1 1\n0 0.5 0.5 1 1 0.9", r"d\.txt, line 2: 6 values are neither"),
        ("cat 0.5 0.5 1 1", r"d\.txt, line 1: 'cat 0\.5 0\.5 1 1' are no numbers"),
        ("0 30 20 12 11\n0 30 22 12 11\n", "2 boxes look like pixels"),
    ],
)
def test_wrong_lines_of_yolo_s(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        yolo(tmp_path, line)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: images/train\nval: images/val\n", "no proper names"),
        ("val: images/val\nnames: [cat]\nnc: 2\n", "nc: 2, but 1 names"),
        ("val: {a: b}\nnames: [cat]\n", "val must be a path"),
        ("names: [cat]\n", "names none of train"),
        ("[", "cannot read .* as YAML"),
    ],
)
def test_wrong_yaml(tmp_path: Path, content: str, message: str) -> None:
    layouts.ultralytics(tmp_path)
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_coco(tmp_path)


def test_class_names_that_yaml_takes_for_others(tmp_path: Path) -> None:
    layouts.ultralytics(tmp_path)
    (tmp_path / "data.yaml").write_text("val: images/val\nnames: [no, 1.0]\n")
    assert open_coco(tmp_path).category_names == ("no", "1.0")


def test_yolo_without_labels_or_pictures(tmp_path: Path) -> None:
    layouts.ultralytics(tmp_path)
    (tmp_path / "images" / "val" / "d.png").unlink()
    folder = open_coco(tmp_path)
    assert folder.annotations.left_out.annotations_without_image == 1
    (tmp_path / "labels").rename(tmp_path / "boxes")
    with pytest.raises(FileNotFoundError, match=r"no labels: looked for .*labels/val"):
        open_coco(tmp_path)
    (tmp_path / "images" / "val").rename(tmp_path / "images" / "old")
    with pytest.raises(FileNotFoundError, match=r"names .*images/val, and it is not there"):
        open_coco(tmp_path)


def test_yolo_s_pictures_as_stored(tmp_path: Path) -> None:
    layouts.ultralytics(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", layouts.SIDES).save(tmp_path / "images" / "val" / "d.png", exif=exif)
    assert seen(open_coco(tmp_path, stored_pixels=True)) == OBJECTS["val"]
    turned = next(iter(open_coco(tmp_path).images.values()))
    assert (turned.width, turned.height) == layouts.SIDES[::-1]


@pytest.mark.parametrize("write", [layouts.ultralytics, layouts.voc_beside])
def test_pictures_that_cannot_be_read(write: Writer, tmp_path: Path) -> None:
    write(tmp_path)
    path = next(path for path in tmp_path.rglob("c.png"))
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"c\.png is not an image"):
        open_coco(tmp_path, "train2017")
    assert check_dataset(tmp_path).splits[0].unreadable == {"c.png": f"{path} is not an image in a known format"}


def change_voc(tmp_path: Path, old: str, new: str) -> Path:
    layouts.voc(tmp_path)
    path = tmp_path / "Annotations" / "d.xml"
    path.write_text(path.read_text().replace(old, new))
    return path


def test_voc_s_difficult_objects_do_not_count(tmp_path: Path) -> None:
    change_voc(tmp_path, "<difficult>0", "<difficult>1")
    assert open_coco(tmp_path).annotations.crowd.tolist() == [True, False, False]


def test_voc_s_missing_sizes_and_bad_boxes(tmp_path: Path) -> None:
    change_voc(tmp_path, f"<width>{layouts.SIDES[0]}", "<width>0")
    assert seen(open_coco(tmp_path)) == OBJECTS["val"]
    change_voc(tmp_path / "bad", "<xmin>5", "<xmin>left")
    assert open_coco(tmp_path / "bad").annotations.left_out.bad_boxes == 1


def test_wrong_files_of_voc_s(tmp_path: Path) -> None:
    path = change_voc(tmp_path, "<name>cat</name>", "<name> </name>")
    with pytest.raises(ValueError, match=r"d\.xml: object 1 has no name"):
        open_coco(tmp_path)
    path.write_text("<annotation>")
    with pytest.raises(ValueError, match=r"cannot read .*d\.xml as XML"):
        open_coco(tmp_path)
    path.write_text("<html/>")
    with pytest.raises(ValueError, match="begins with <html>"):
        open_coco(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.txt lists d, and .*d\.xml is missing"):
        open_coco(tmp_path)


def test_a_picture_of_voc_s_that_is_missing(tmp_path: Path) -> None:
    layouts.voc(tmp_path)
    (tmp_path / "JPEGImages" / "e.png").unlink()
    folder = open_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .* the first is e\.png"):
        folder.check_images(folder.image_ids)


def test_darknet_s_files_that_are_wrong(tmp_path: Path) -> None:
    layouts.cvat_yolo(tmp_path)
    (tmp_path / "obj.data").write_text("classes = 3\nvalid = valid.txt\n")
    with pytest.raises(ValueError, match=r"obj\.data has nc: 3, but 2 names"):
        open_coco(tmp_path)
    (tmp_path / "obj.data").write_text("names = obj.names\n")
    with pytest.raises(ValueError, match=r"obj\.data is no YOLO data set: it names none of train, val, valid, test"):
        open_coco(tmp_path)
    (tmp_path / "obj.names").unlink()
    with pytest.raises(ValueError, match=r"no names of the classes: looked for .*obj\.names"):
        open_coco(tmp_path)


def test_cvat_s_label_map_names_the_classes(tmp_path: Path) -> None:
    """Also those that nothing is annotated as, in its order."""
    layouts.cvat_voc(tmp_path)
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:::\nzebra:::\ncat:1,1,1::\n")
    folder = open_coco(tmp_path)
    assert folder.category_names == ("zebra", "cat", "dog")
    assert seen(folder) == OBJECTS["val"]
