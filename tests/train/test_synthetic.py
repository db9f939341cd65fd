import json
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from asag.train.synthetic import CATEGORIES, write_synthetic_dataset
from asag.train.synthetic_images import paint_image

SPLITS = {"train2017": 30, "val2017": 4}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "synthetic"
    return write_synthetic_dataset(root, train_images=30, val_images=4, seed=3)


def annotations(root, split="train2017"):
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def files_of(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_pycocotools_reads_every_split(dataset, capsys):
    for split, count in SPLITS.items():
        coco = COCO(str(dataset / "annotations" / f"instances_{split}.json"))
        assert len(coco.imgs) == count
        assert sorted(coco.cats) == sorted(CATEGORIES)
        for image in coco.loadImgs(coco.getImgIds()):
            with Image.open(dataset / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                assert picture.mode == "RGB"


def test_objects_are_as_the_detector_needs_them(dataset):
    content = annotations(dataset)
    boxes = np.array([entry["bbox"] for entry in content["annotations"]])
    areas = np.array([entry["area"] for entry in content["annotations"]])
    longer = boxes[:, 2:].max(axis=1)
    assert longer.min() >= 11.5
    assert 0.5 < (longer < 60).mean() < 0.85  # P3 is probed for these
    assert ((longer >= 60) & (longer < 200)).mean() > 0.15
    assert (areas < 32**2).mean() > 0.3
    assert (areas > 96**2).any()
    assert (areas <= boxes[:, 2] * boxes[:, 3] + 0.1).all()
    counts = np.unique([entry["image_id"] for entry in content["annotations"]], return_counts=True)[1]
    assert len(counts) == 30
    assert counts.min() >= 3
    assert counts.max() <= 12
    assert len({entry["category_id"] for entry in content["annotations"]}) == len(CATEGORIES)
    shapes = {(image["height"], image["width"]) for image in content["images"]}
    assert any(height > width for height, width in shapes)
    assert any(height < width for height, width in shapes)


def test_boxes_lie_inside_and_hardly_overlap(dataset):
    content = annotations(dataset)
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for identifier, size in sizes.items():
        boxes = np.array([entry["bbox"] for entry in content["annotations"] if entry["image_id"] == identifier])
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        assert (corners >= 0).all()
        assert (corners[:, [2, 3]] <= np.array(size)).all()
        low = np.maximum(corners[:, None, :2], corners[None, :, :2])
        high = np.minimum(corners[:, None, 2:], corners[None, :, 2:])
        shared = np.prod((high - low).clip(0), axis=2)
        area = np.prod(boxes[:, 2:], axis=1)
        overlap = shared / np.minimum(area[:, None], area[None, :])
        np.fill_diagonal(overlap, 0)
        assert overlap.max() <= 0.061


def test_a_box_is_tight_to_the_painted_pixels(monkeypatch):
    monkeypatch.setattr("asag.train.synthetic_images._background", lambda h, w, g: np.full((h, w, 3), 128, np.float32))
    for seed in range(12):
        picture, objects = paint_image(256, 256, (1, 1), np.random.default_rng(seed))
        changed = (np.asarray(picture).astype(int) != 128).any(axis=2)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        x, y, width, height = objects[0].box
        # The outermost pixels are partly covered, and may be too faint to change a rounded value.
        assert [columns[0], rows[0]] == pytest.approx([x, y], abs=1.5)
        assert [columns[-1] + 1, rows[-1] + 1] == pytest.approx([x + width, y + height], abs=1.5)


def test_the_same_settings_give_the_same_bytes(dataset, tmp_path):
    again = write_synthetic_dataset(tmp_path / "again", train_images=30, val_images=4, seed=3)
    assert files_of(again) == files_of(dataset)
    other = write_synthetic_dataset(tmp_path / "other", train_images=3, val_images=1, seed=4)
    assert annotations(other)["annotations"] != annotations(dataset)["annotations"]


def test_an_image_does_not_depend_on_how_many_there_are(dataset, tmp_path):
    few = write_synthetic_dataset(tmp_path / "few", train_images=2, val_images=1, seed=3)
    name = "train2017/000000000002.jpg"
    assert (few / name).read_bytes() == (dataset / name).read_bytes()


def test_a_dataset_that_is_there_is_left_alone(dataset, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(dataset, root)
    marker = root / "train2017" / "000000000001.jpg"
    marker.write_bytes(b"kept")
    calls = []
    write_synthetic_dataset(root, train_images=30, val_images=4, seed=3, progress=lambda *a: calls.append(a))
    assert marker.read_bytes() == b"kept"
    assert not calls
    with pytest.raises(ValueError, match="other settings"):
        write_synthetic_dataset(root, train_images=30, val_images=4, seed=5)
    assert marker.read_bytes() == b"kept"


def test_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        write_synthetic_dataset(tmp_path, train_images=1, val_images=1)
    with pytest.raises(ValueError, match="is a file"):
        write_synthetic_dataset(tmp_path / "letters.txt", train_images=1, val_images=1)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synthetic_dataset(tmp_path / "data", train_images=2, val_images=1, image_size=64, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"train_images": 0}, {"image_size": 10}, {"seed": -1}])
def test_settings_out_of_range(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"at least 1|pixels|negative"):
        write_synthetic_dataset(tmp_path / "data", **{"train_images": 1, "val_images": 1, **wrong})
    assert not (tmp_path / "data").exists()
