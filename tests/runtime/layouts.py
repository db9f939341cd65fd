"""One small data set in every layout, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image

SIDES = (60, 40)
"""Width and height of every picture, in pixels."""

OBJECTS: Mapping[str, Mapping[str, list[tuple[str, tuple[int, int, int, int]]]]] = {
    "train": {"a": [("cat", (1, 2, 11, 22)), ("dog", (30, 5, 50, 25))], "b.v1": [("dog", (0, 0, 60, 40))], "c": []},
    "val": {"d": [("cat", (4, 4, 36, 36))], "e": [("cat", (10, 0, 30, 40)), ("cat", (31, 3, 59, 39))]},
}
"""Class and corners of the objects of every image, by split; pixels."""

NAMES = ("cat", "dog")


def _pictures(folder: Path, split: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(OBJECTS[split]):
        Image.new("RGB", SIDES, (number + 1, len(split), 0)).save(folder / f"{name}.png")


def _coco(path: Path, split: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [
        {"id": number, "file_name": f"{name}.png", "width": SIDES[0], "height": SIDES[1]}
        for number, name in enumerate(OBJECTS[split], start=1)
    ]
    annotations = [
        {"image_id": number, "category_id": NAMES.index(name) + 1, "bbox": [left, top, right - left, bottom - top]}
        for number, objects in enumerate(OBJECTS[split].values(), start=1)
        for name, (left, top, right, bottom) in objects
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, start=1)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def _yolo_labels(folder: Path, split: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, objects in OBJECTS[split].items():
        lines = [
            f"{NAMES.index(kind)} {(left + right) / 120} {(top + bottom) / 80} {(right - left) / 60}"
            f" {(bottom - top) / 40}"
            for kind, (left, top, right, bottom) in objects
        ]
        if lines:
            (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def _voc(folder: Path, split: str, database: str = "Unknown") -> None:
    """XML files; a source that counts pixels from 1 gets corners that do."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 1 if database.startswith("The VOC") else 0
    for name, objects in OBJECTS[split].items():
        boxes = "".join(
            f"<object><name>{kind}</name><difficult>0</difficult><bndbox><xmin>{left + first}</xmin><ymin>{top + first}"
            f"</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
            for kind, (left, top, right, bottom) in objects
        )
        (folder / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.png</filename><source><database>{database}</database></source>"
            f"<size><width>{SIDES[0]}</width><height>{SIDES[1]}</height><depth>3</depth></size>{boxes}</annotation>"
        )


def coco(root: Path) -> None:
    for split in OBJECTS:
        _pictures(root / f"{split}2017", split)
        _coco(root / "annotations" / f"instances_{split}2017.json", split)


def cvat(root: Path) -> None:
    for split in OBJECTS:
        _pictures(root / "images" / split, split)
        _coco(root / "annotations" / f"instances_{split}.json", split)


def roboflow_coco(root: Path) -> None:
    for split, name in (("train", "train"), ("val", "valid")):
        _pictures(root / name, split)
        _coco(root / name / "_annotations.coco.json", split)


def ultralytics(root: Path) -> None:
    for split in OBJECTS:
        _pictures(root / "images" / split, split)
        _yolo_labels(root / "labels" / split, split)
    (root / "data.yaml").write_text(
        "path: /content/far/away\ntrain: images/train\nval: images/val\ntest:\nnames:\n  0: cat\n  1: dog\n"
    )


def roboflow_yolo(root: Path) -> None:
    for split, name in (("train", "train"), ("val", "valid")):
        _pictures(root / name / "images", split)
        _yolo_labels(root / name / "labels", split)
    (root / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: ['cat', 'dog']\n"
    )


def yolo_lists(root: Path) -> None:
    for split in OBJECTS:
        _pictures(root / "pictures", split)
        _yolo_labels(root / "pictures", split)
        (root / f"{split}.txt").write_text("".join(f"./pictures/{name}.png\n" for name in OBJECTS[split]))
    (root / "data.yaml").write_text("train: train.txt\nval: [val.txt]\nnames: [cat, dog]\n")


def cvat_yolo(root: Path) -> None:
    """YOLO 1.1, with paths as if in a folder `data`."""
    for split, name in (("train", "train"), ("val", "valid")):
        _pictures(root / f"obj_{name}_data", split)
        _yolo_labels(root / f"obj_{name}_data", split)
        lines = (f"data/obj_{name}_data/{image}.png\n" for image in OBJECTS[split])
        (root / f"{name}.txt").write_text("".join(lines))
    (root / "obj.names").write_text("cat\ndog\n")
    (root / "obj.data").write_text(
        "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = backup/\n"
    )


def cvat_voc(root: Path) -> None:
    voc(root)
    (root / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:170,240,209::\ndog:1,2,3::\n"
    )


def voc(root: Path) -> None:
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, objects in OBJECTS.items():
        _pictures(root / "JPEGImages", split)
        _voc(root / "Annotations", split, "The VOC2012 Database")
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(objects) + "\n")
        (root / "ImageSets" / "Main" / f"dog_{split}.txt").write_text("".join(f"{name} -1\n" for name in objects))


def voc_beside(root: Path) -> None:
    for split, name in (("train", "train"), ("val", "valid")):
        _pictures(root / name, split)
        _voc(root / name, split)
    (root / "train" / "c.xml").unlink()


LAYOUTS: tuple[Callable[[Path], None], ...] = (
    coco,
    cvat,
    roboflow_coco,
    ultralytics,
    roboflow_yolo,
    yolo_lists,
    cvat_yolo,
    voc,
    cvat_voc,
    voc_beside,
)


def only_split(root: Path) -> None:
    """What CVAT exports of a task: one split, named default."""
    _pictures(root / "images" / "default", "train")
    _coco(root / "annotations" / "instances_default.json", "train")
