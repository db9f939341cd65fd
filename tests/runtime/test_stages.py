"""The pictures of the method: what is drawn where, and where it is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import open_session
from runtime.detect import detect_files
from runtime.parity.comparison import compare
from runtime.reports.document import make_document
from runtime.reports.page import write_page
from runtime.session import Session
from runtime.stages import ANCHOR_COLOUR, PATCH_COLOUR, draw_stages, read_stages, stage_panels
from tests.builders import random_detector, random_picture, write_checkpoint
from tests.runtime.toy_detector import ToySession, toy_metadata, write_toy_dataset


def one_of_each() -> dict[str, np.ndarray]:
    """Stages of a 64 x 96 image that fills an input of half its size: one patch, one anchor, one class."""
    return {
        "sizes": np.array([[32, 48]], np.float32),
        "p4_crop_xy": np.array([[1, 0]]),
        "p3_crop_xy": np.zeros((0, 2), np.int64),
        "anchors": np.array([[[24, 16, 20, 10], [0, 0, 0, 0]]], np.float32),
        "valid": np.array([[True, False]]),
        "proposal_logits": np.array([[[-9, 2, -9], [9, 9, 9]]], np.float32),
        "proposal_boxes": np.array([[[0.5, 0.5, 0.5, 0.25], [0, 0, 0, 0]]], np.float32),
        "boxes": np.array([[[0.25, 0.25, 0.75, 0.75], [0, 0, 0, 0]]], np.float32),
        "scores": np.array([[0.9, 0.0]], np.float32),
        "labels": np.array([[3, 1]]),
        "overflow": np.array([2]),
    }


def test_boxes_are_in_pixels_of_the_original_image() -> None:
    stages = read_stages(one_of_each(), toy_metadata(), (64, 96))
    assert stages.patches["P4"].tolist() == [[32, 0, 32 + 480, 480]]
    assert stages.patches["P3"].shape == (0, 4)
    assert stages.anchors.tolist() == [[28, 22, 68, 42]]
    assert stages.proposals.boxes.tolist() == [[24, 24, 72, 40]]
    assert stages.proposals.labels.tolist() == [3]
    assert stages.proposals.scores[0] == pytest.approx(1 / (1 + np.exp(-2)))
    assert stages.detections.boxes.tolist() == [[24, 16, 72, 48]]
    assert stages.detections.overflow == 2


def test_panels_show_each_stage_in_its_colour() -> None:
    stages = read_stages(one_of_each(), toy_metadata(), (64, 96))
    panels = stage_panels(Image.new("RGB", (96, 64)), stages, toy_metadata(), side=96)
    pixels = [np.asarray(panel.picture) for panel in panels]
    assert all(picture.shape == (64, 96, 3) for picture in pixels)
    assert (pixels[0][1, 40] == PATCH_COLOUR).all()
    assert (pixels[0][30, 10] == 0).all()
    assert (pixels[1][22, 40] == ANCHOR_COLOUR).all()
    assert pixels[2][24, 40].any()
    assert pixels[3][16, 60].any()
    assert [panel.caption for panel in panels] == [
        "Patches explored: 1 on P4 (thick)",
        "1 sparse anchor",
        "Dynamic proposals: 1 of 1 score at least 0.3",
        "1 final box scoring at least 0.3",
    ]


def test_no_patches_and_nothing_found() -> None:
    tensors = one_of_each()
    del tensors["p4_crop_xy"], tensors["p3_crop_xy"]
    tensors["scores"][:] = 0
    tensors["valid"][:] = False
    stages = read_stages(tensors, toy_metadata(), (64, 96))
    captions = [panel.caption for panel in stage_panels(Image.new("RGB", (96, 64)), stages, toy_metadata())]
    assert captions[0].startswith("No patches")
    assert captions[1] == "0 sparse anchors"
    assert captions[3].startswith("0 final boxes")


@pytest.mark.parametrize(("height", "width"), [(1, 700), (700, 1), (3, 2), (900, 1400)])
def test_any_image_gives_a_legible_picture(height: int, width: int) -> None:
    tensors = one_of_each()
    tensors["sizes"] = np.array([[max(1, height // 2), max(1, width // 2)]], np.float32)
    stages = read_stages(tensors, toy_metadata(), (height, width))
    picture = draw_stages(Image.new("RGB", (width, height), "blue"), stages, toy_metadata())
    assert picture.width >= 4 * 300
    assert picture.height >= 80


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return open_session(write_checkpoint(tmp_path_factory.mktemp("stages") / "small.safetensors", random_detector()))


def test_stages_end_in_the_detections_of_the_same_session(session: Session) -> None:
    for seed, size in enumerate([(160, 192), (90, 300), (41, 33)]):
        picture = random_picture(seed, *size)
        stages, (found,) = session.stages(picture), session.detect([picture])
        assert len(found) > 0
        assert np.array_equal(stages.detections.labels, found.labels)
        assert np.allclose(stages.detections.scores, found.scores, atol=1e-6)
        assert np.allclose(stages.detections.boxes, found.boxes, atol=1e-2)
        assert stages.detections.overflow == found.overflow
        assert len(stages.anchors) == len(stages.proposals) > 0
        assert (np.diff(stages.proposals.scores) <= 0).all()
        capacity = session.metadata.patch_capacity
        assert all(len(stages.patches[level]) <= room for level, room in zip(("P4", "P3"), capacity, strict=True))


def test_files_get_a_picture_of_the_stages(session: Session, tmp_path: Path) -> None:
    for number in range(2):
        Image.fromarray(random_picture(number, 120, 90)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_text("no pixels")
    summary = detect_files(session, [tmp_path], tmp_path / "out", score_threshold=0.1, batch_size=2, stages=True)
    assert [path.name for path in summary.pictures] == ["0-stages.jpg", "1-stages.jpg"]
    assert [path.name for path, _ in summary.errors] == ["broken.png"]
    plain = detect_files(session, [tmp_path], tmp_path / "plain", score_threshold=0.1)
    assert plain.detections == summary.detections


def test_models_without_stages_say_so(toy_onnx: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "image.png")
    session = open_session(toy_onnx)
    with pytest.raises(ValueError, match=r"toy\.onnx gives detections only.*safetensors"):
        detect_files(session, [tmp_path / "image.png"], tmp_path / "out", stages=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="PyTorch checkpoint"):
        session.stages(tmp_path / "image.png")


class StagedToySession(ToySession):
    shows_stages = True

    def stages(self, image):  # type: ignore[no-untyped-def]
        return read_stages(one_of_each(), self.metadata, (image.height, image.width))


def test_the_report_shows_stages_where_the_reference_has_them(tmp_path: Path) -> None:
    dataset = write_toy_dataset(tmp_path / "data", images=5)
    for reference, expected in ((StagedToySession(), 4 + 3 * 4), (ToySession(), 4), (None, 4)):
        result = compare(ToySession(), [], dataset)
        document = make_document(result, dataset, pictures=4, reference=reference)
        page = write_page(tmp_path / "report.html", [document]).read_text()
        assert page.count("<img ") == expected
        assert ("Patches explored: 1 on P4" in page) == (expected > 4)
