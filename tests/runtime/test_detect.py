from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from asag.runtime import image_source
from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.detect import DetectionSummary, detect_files, expand_paths
from tests.runtime.toy_detector import ToySession


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for number, name in enumerate(["b.png", "a.png", "c.JPG"]):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 70 + number, 3), np.uint8)
        Image.fromarray(pixels).save(path / name)
    (path / "notes.txt").write_text("not an image")
    return path


def written(summary: DetectionSummary) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What images.json and detections.json hold."""
    images = json.loads((summary.json_path.parent / "images.json").read_text())
    return images, json.loads(summary.json_path.read_text())


def test_writes_json_and_pictures(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    summary = detect_files(
        ToySession(),
        [folder],
        tmp_path / "out",
        score_threshold=0.4,
        progress=lambda done, count: seen.append((done, count)),
        batch_size=2,
    )
    content, detections = written(summary)
    assert [Path(image["file_name"]).name for image in content["images"]] == ["a.png", "b.png", "c.JPG"]
    assert [image["width"] for image in content["images"]] == [71, 70, 72]
    assert len(detections) == summary.detections > 0
    assert all(record["score"] >= 0.4 for record in detections)
    assert {record["category_name"] for record in detections} <= {"circle", "square", "ring"}
    assert (content["errors"], content["interrupted"]) == ([], False)
    assert [path.name for path in summary.pictures] == ["a.jpg", "b.jpg", "c.jpg"]
    for path, image in zip(summary.pictures, content["images"], strict=True):
        with Image.open(path) as picture:
            assert picture.size == (image["width"], image["height"])
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_records_match_the_session(folder: Path, tmp_path: Path) -> None:
    path = folder / "a.png"
    (expected,) = ToySession().detect([path])
    summary = detect_files(ToySession(), [path], tmp_path, score_threshold=0)
    _, records = written(summary)
    x, y, width, height = np.array([record["bbox"] for record in records]).T
    assert np.allclose(np.stack([x, y, x + width, y + height], 1), expected.boxes, atol=1e-4)


def test_files_that_are_not_there_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.png is no file, nor are the others"):
        detect_files(ToySession(), [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_files_do_not_stop_the_rest(folder: Path, tmp_path: Path) -> None:
    names = ["a.png", "missing.png", "notes.txt", "b.png"]
    summary = detect_files(ToySession(), [folder / name for name in names], tmp_path / "out", batch_size=2)
    assert summary.images == 2
    assert [path.name for path, _ in summary.errors] == ["missing.png", "notes.txt"]
    content, _ = written(summary)
    assert [image["id"] for image in content["images"]] == [1, 2]
    assert "not found" in content["errors"][0]["reason"]


def test_pictures_never_collide_or_overwrite_an_input(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (20, 20)).save(other / "c.jpg")
    before = (folder / "c.JPG").read_bytes(), (other / "c.jpg").read_bytes()
    summary = detect_files(ToySession(), [folder / "c.JPG", other / "c.jpg", other / "c.jpg"], other)
    assert len({path.resolve() for path in summary.pictures}) == 3
    assert ((folder / "c.JPG").read_bytes(), (other / "c.jpg").read_bytes()) == before


def test_wrong_arguments(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no images in the folder"):
        expand_paths([empty])
    with pytest.raises(ValueError, match="no images were named"):
        detect_files(ToySession(), [], tmp_path)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        detect_files(ToySession(), [folder], folder / "a.png")


def test_folders_are_read_to_the_bottom_and_what_is_skipped_is_named(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_heic = image_source.image_suffixes() - {".heic"}
    monkeypatch.setattr(image_source, "image_suffixes", lambda: without_heic)
    (folder / "below" / "deep").mkdir(parents=True)
    for name in ("below/deep/d.ppm", "below/e.jfif", "f.jp2", ".hidden.png"):
        Image.new("RGB", (9, 9)).save(folder / name, {"e.jfif": "JPEG"}.get(Path(name).name))
    (folder / "phone.heic").write_bytes(b"")
    found = [path.relative_to(folder).as_posix() for path in expand_paths([folder])]
    assert found == ["a.png", "b.png", "below/deep/d.ppm", "below/e.jfif", "c.JPG", "f.jp2"]
    assert "skipped 2 files that are no images: notes.txt, phone.heic; for HEIC: pip install pillow-heif" in caplog.text
    before = len(expand_paths([folder]))
    detect_files(ToySession(), [folder], folder / "results")
    assert len(expand_paths([folder])) == before, "the pictures of an earlier run are no images to detect on"
    assert len(expand_paths([folder / "results"])) == before


def test_an_interrupted_run_writes_what_it_has(folder: Path, tmp_path: Path) -> None:
    def interrupt(done: int, count: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        detect_files(ToySession(), [folder], tmp_path / "out", progress=interrupt)
    content = json.loads((tmp_path / "out" / "images.json").read_text())
    assert (len(content["images"]), content["interrupted"]) == (2, True)
    assert {record["image_id"] for record in json.loads((tmp_path / "out" / "detections.json").read_text())} <= {1, 2}


def test_the_data_set_s_image_ids(toy_dataset: CocoFolder, tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    Image.new("RGB", (30, 30)).save(toy_dataset.images_dir / "stranger.png")
    summary = detect_files(ToySession(), [toy_dataset.images_dir], tmp_path, annotations=toy_dataset)
    assert [(path.name, reason) for path, reason in summary.errors] == [
        ("stranger.png", "no image of the annotations has this name")
    ]
    loaded = COCO(toy_dataset.annotations_path).loadRes(str(summary.json_path))
    assert sorted(loaded.getImgIds()) == [1, 2, 3, 4]
    assert len(loaded.anns) == summary.detections > 0
