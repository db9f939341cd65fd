"""Folders, videos and bad files as sources; reading ahead; memory that does not grow."""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from asag.runtime.detect import detect_files
from asag.runtime.errors import BackendUnavailableError
from asag.runtime.image_source import read_ahead, read_images, video_length
from tests.runtime.toy_detector import ToySession

FRAMES = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50 + number, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
    (path / "notes.txt").write_text("not an image")
    return path


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Frames of rising brightness, 64 x 48."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(FRAMES):
            grey = np.full((48, 64, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_a_folder_stands_for_its_images(folder: Path) -> None:
    files = [folder / f"{number}.png" for number in range(5)]
    for images in (folder, str(folder), [folder]):
        found = ToySession().detect(images, batch_size=2)
        for ours, expected in zip(found, ToySession().detect(files), strict=True):
            assert np.array_equal(ours.scores, expected.scores)
            assert ours.image_size == expected.image_size
    (alone,) = ToySession().detect(files[3])
    assert alone.image_size == (40, 53)


def test_frames_of_a_video_in_order(video: Path) -> None:
    found = ToySession().detect(video, batch_size=5)
    brightness = [float(detections.scores.sum()) for detections in found]
    assert len(found) == FRAMES, "the first frame is black: no detections, but a result"
    assert brightness == sorted(brightness)


def test_frames_are_written_with_their_numbers(video: Path, folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    summary = detect_files(
        ToySession(),
        [folder / "2.png", video],
        tmp_path / "out",
        batch_size=4,
        progress=lambda done, count: seen.append((done, count)),
    )
    content = json.loads((tmp_path / "out" / "images.json").read_text())
    assert [image.get("frame") for image in content["images"]] == [None, *range(FRAMES)]
    assert {image["file_name"] for image in content["images"]} == {str(folder / "2.png"), str(video)}
    assert summary.pictures[1].name == "clip-000000.jpg"
    assert all(picture.is_file() for picture in summary.pictures)
    assert video_length(video) == FRAMES
    assert seen[-1] == (FRAMES + 1, FRAMES + 1)


def test_a_damaged_video_does_not_stop_the_rest(video: Path, folder: Path, tmp_path: Path) -> None:
    content = video.read_bytes()
    (tmp_path / "half.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    files = [tmp_path / "half.mp4", tmp_path / "none.mp4", tmp_path / "text.mp4", folder / "0.png"]
    summary = detect_files(ToySession(), files, tmp_path / "out")
    assert summary.images >= 1
    assert {path.name for path, _ in summary.errors} >= {"none.mp4", "text.mp4"}
    assert all("\n" not in reason for _, reason in summary.errors)
    assert json.loads((tmp_path / "out" / "images.json").read_text())["images"][-1]["file_name"].endswith("0.png")


def test_without_the_library_a_video_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(BackendUnavailableError, match="pip install av"):
        next(read_images("clip.mp4"))


def test_bad_images_keep_their_place(folder: Path) -> None:
    files = [folder / "0.png", folder / "notes.txt", folder / "none.png", folder / "1.png"]
    with pytest.raises(ValueError, match=r"notes\.txt"):
        ToySession().detect(files, batch_size=3)
    errors: list[tuple[str, Exception]] = []
    found = ToySession().detect(files, 3, on_error=lambda name, error: errors.append((name, error)))
    assert [len(detections) for detections in found] == [16, 0, 0, 16]
    assert [Path(name).name for name, _ in errors] == ["notes.txt", "none.png"]
    assert [type(error) for _, error in errors] == [ValueError, FileNotFoundError]


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    alive, most = set(), 0

    def pictures() -> Iterator[Image.Image]:
        nonlocal most
        for number in range(150):
            picture = Image.new("RGB", (60, 40), (number, 90, 30))
            alive.add(number)
            weakref.finalize(picture, alive.discard, number)
            most = max(most, len(alive))
            yield picture
            del picture

    count = sum(1 for _ in ToySession().stream(pictures(), batch_size=5))
    assert count == 150
    assert most <= 3 * 5, "the batch that runs, the one after it, and the one being read"


class SlowSession(ToySession):
    """Takes its time, and notes which batches had been read when it started one."""

    def __init__(self, read: list[int]) -> None:
        super().__init__()
        self.read, self.seen = read, list[int]()

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        time.sleep(0.05)
        self.seen.append(len(self.read))
        return super().run(tensors)


def test_the_next_batch_is_read_while_one_runs() -> None:
    read: list[int] = []

    def pictures() -> Iterator[Image.Image]:
        for number in range(6):
            read.append(threading.get_ident())
            yield Image.new("RGB", (60, 40), (number, 90, 30))

    session = SlowSession(read)
    assert sum(1 for _ in session.stream(pictures(), batch_size=2)) == 6
    assert session.seen == [4, 6, 6]
    assert len(set(read)) == 1
    assert read[0] != threading.get_ident()


def test_an_error_of_the_source_comes_after_what_was_before_it() -> None:
    def numbers() -> Iterator[int]:
        yield from (1, 2)
        raise KeyError("source")

    ahead = read_ahead(numbers())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(KeyError, match="source"):
        next(ahead)
    assert threading.active_count() < 5
