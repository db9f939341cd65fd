"""The pictures of a forward pass: what is drawn where, and where it is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asag.family import Stage, Value
from asag.runtime import open_session
from asag.runtime.detect import detect_files
from asag.runtime.drawing import class_colour
from asag.runtime.parity.comparison import compare
from asag.runtime.postprocessing import Detections
from asag.runtime.reports.document import make_document
from asag.runtime.reports.page import write_page
from asag.runtime.session import Session
from asag.runtime.stages.draw import BOX_COLOUR, PLACE_COLOUR, SeenStages, draw_stages, stage_panels
from tests.builders import random_detector, random_picture, write_checkpoint
from tests.runtime.toy_detector import ToySession, toy_metadata, write_toy_dataset

PATCH = (Value("corners", "places", cell=(16, 2)), Value("valid", "valid"))
STAGES = (
    Stage("features", (Value("map", "maps"),)),
    Stage("coarse_patches", PATCH, part="anchors", aligns=True),
    Stage("fine_patches", (Value("corners", "places", cell=(8, 2)), Value("valid", "valid")), part="anchors"),
    Stage("anchors", (Value("boxes", "boxes"), Value("valid", "valid")), aligns=True),
    Stage("proposals", (Value("boxes", "boxes", frame="content"), Value("logits", "scores"))),
    Stage("head", (Value("logits", "scores"), Value("boxes", "boxes", frame="content"))),
)
METADATA = toy_metadata(stages=STAGES)


def one_of_each() -> dict[str, np.ndarray]:
    """Stages of a 64 x 96 image that fills an input of half its size: of each kind one that exists and one that does
    not.
    """
    return {
        "sizes": np.array([[32, 48]], np.float32),
        "features/map": np.zeros((1, 3, 8, 12), np.float32),
        "coarse_patches/corners": np.array([[[1, 0], [0, 0]]]),
        "coarse_patches/valid": np.array([[True, False]]),
        "fine_patches/corners": np.zeros((1, 1, 2), np.int64),
        "fine_patches/valid": np.array([[False]]),
        "anchors/boxes": np.array([[[24, 16, 20, 10, 0.9], [0, 0, 0, 0, 0]]], np.float32),
        "anchors/valid": np.array([[True, False]]),
        "proposals/logits": np.array([[[-9, 2, -9], [9, 9, 9]]], np.float32),
        "proposals/boxes": np.array([[[0.5, 0.5, 0.5, 0.25], [0, 0, 0, 0]]], np.float32),
        "head/logits": np.array([[[-9, 3, -9], [9, 9, 9]]], np.float32),
        "head/boxes": np.array([[[0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]]], np.float32),
    }


def seen_stages(size: tuple[int, int] = (64, 96), **changes: np.ndarray) -> SeenStages:
    height, width = size
    box = np.array([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]], np.float32)
    found = Detections(box, np.array([0.9], np.float32), np.array([3]), 2, size)
    return SeenStages(one_of_each() | changes, found, METADATA)


def outline(picture: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Leftmost column, topmost row, rightmost column and lowest row that have this colour."""
    rows, columns = np.nonzero((picture == colour).all(axis=2))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_each_stage_is_drawn_where_it_is_in_its_colour() -> None:
    panels = stage_panels(Image.new("RGB", (96, 64)), seen_stages(), 0.3)
    pixels = [np.asarray(panel.picture) for panel in panels]
    assert all(picture.shape == (320, 480, 3) for picture in pixels), "five pixels for each of the image's"
    # In the input, half as large as the image, the patch reaches from 16 to 48, and the anchor from 14 to 34.
    assert outline(pixels[0], PLACE_COLOUR) == (16 * 10, 0, 479, 319)
    assert outline(pixels[1], BOX_COLOUR) == (14 * 10, 11 * 10, 34 * 10, 21 * 10)
    # Proposals are fractions of the content; the class is the best of the first row's, not a category id.
    assert outline(pixels[2], class_colour(1)) == (120, 120, 360, 200)
    assert (pixels[3] == class_colour(1)).all(axis=2).any()
    assert [panel.caption for panel in panels] == [
        "coarse patches: 1, fine patches: 0",
        "anchors: 1",
        "proposals: 1 of 1 score at least 0.3",
        "detections: 1 of 1 score at least 0.3",
    ]


def test_coarse_places_have_the_thickest_line_and_the_image_is_darkened() -> None:
    white = Image.new("RGB", (96, 64), "white")
    fine = {"fine_patches/corners": np.array([[[3, 1]]]), "fine_patches/valid": np.array([[True]])}
    pixels = np.asarray(stage_panels(white, seen_stages(**fine), 0.3)[0].picture)
    red = (pixels == PLACE_COLOUR).all(axis=2)
    # A row through the left side of the coarse patch and through both sides of the fine one.
    assert np.flatnonzero(red[150, :470]).tolist() == [160, 161, 162, 240, 400]
    assert (pixels[300, 60] < 200).all(), "nothing is drawn there"
    assert (np.asarray(white) == 255).all(), "the picture that is given stays as it is"


def test_cells_are_those_of_the_features() -> None:
    """Of two maps, of 8 x 12 and 4 x 6 cells: the second's last but one, and one that is not active."""
    features = Stage("features", (Value("fine", "maps"), Value("coarse", "maps")))
    kept = Stage("kept_tokens", (Value("cells", "cells"), Value("active", "valid")))
    metadata = toy_metadata(stages=(features, kept, STAGES[-1]), input_height=32, input_width=48)
    values = {
        "features/fine": np.zeros((1, 3, 8, 12)),
        "features/coarse": np.zeros((1, 3, 4, 6)),
        "kept_tokens/cells": np.array([[8 * 12 + 3 * 6 + 4, 0]]),
        "kept_tokens/active": np.array([[True, False]]),
    }
    seen = dataclasses.replace(seen_stages(**values), metadata=metadata)
    panel = stage_panels(Image.new("RGB", (96, 64)), seen, 0.3)[0]
    assert panel.caption == "kept tokens: 1"
    # A cell of the second map has 8 pixels of the input, 80 of the picture.
    assert outline(np.asarray(panel.picture), PLACE_COLOUR) == (320, 240, 400, 319)


LOOKING = (
    Stage("features", (Value("map", "maps"),)),
    Stage("layer_0", (Value("points", "points", unit=2), Value("boxes", "boxes")), part="decoder"),
    Stage("layer_1", (Value("points", "points", frame="content"), Value("boxes", "boxes")), part="decoder"),
    Stage("head", (Value("logits", "scores"), Value("boxes", "boxes", frame="content"))),
)


def looking_stages(score: float) -> SeenStages:
    """Two queries of the image of :func:`one_of_each`, of which the second scores more, and where they look."""
    small = [[0.5, 0.5, 0.1, 0.1]] * 2
    pixels = [[24, 16, 4, 4]] * 2
    values = {
        "sizes": np.array([[32, 48]], np.float32),
        "layer_0/points": np.array([[[[[3, 4, 1]]], [[[18, 12, 3]]]]], np.float32),
        "layer_0/boxes": np.array([pixels], np.float32),
        "layer_1/points": np.array([[[[0.75, 0.25], [np.nan, 0]], [[0.25, 0.75], [np.inf, 0]]]], np.float32),
        "layer_1/boxes": np.array([pixels], np.float32),
        "head/logits": np.array([[[-9, -9, -9], [-9, score, -9]]], np.float32),
        "head/boxes": np.array([small], np.float32),
    }
    return SeenStages(values, seen_stages().detections, toy_metadata(stages=LOOKING))


def test_the_points_of_the_best_detections_are_drawn_at_every_stage() -> None:
    panels = stage_panels(Image.new("RGB", (96, 64)), looking_stages(score=2.0), 0.3)
    assert [panel.caption for panel in panels[:2]] == [
        "layer 0: 2; where the best 1 look, in a colour each",
        "layer 1: 2; where the best 1 look, in a colour each",
    ]
    dots = []
    for panel in panels[:2]:
        pixels = np.asarray(panel.picture).copy()
        pixels[130:190, 210:270] = 0  # the box
        left, top, right, bottom = outline(pixels, class_colour(0))
        dots.append(((left + right) / 2, (top + bottom) / 2, (right - left) / 2))
    # A cell of 2 * 2^3 pixels at (36, 24) of the input, and no cell at a quarter and three quarters of the content.
    assert dots[0] == pytest.approx((360, 240, 3), abs=1)
    assert dots[1] == pytest.approx((120, 240, 2), abs=1)
    assert dots[0][2] > dots[1][2]


def test_points_as_fractions_of_the_padded_input_are_where_they_are_in_the_content() -> None:
    seen = looking_stages(score=2.0)
    (points,) = (value for value in LOOKING[2].values if value.kind == "points")
    stage = dataclasses.replace(LOOKING[2], values=(dataclasses.replace(points, frame="padded"), LOOKING[2].values[1]))
    # The content has half of the input's height and width.
    padded = dataclasses.replace(
        seen,
        values={**seen.values, "layer_1/points": seen.values["layer_1/points"] / 2},
        metadata=toy_metadata(stages=(*LOOKING[:2], stage, LOOKING[3])),
    )
    image = Image.new("RGB", (96, 64))
    expected, found = (np.asarray(stage_panels(image, each, 0.3)[1].picture) for each in (seen, padded))
    np.testing.assert_array_equal(found, expected)


def test_points_of_a_stage_without_boxes_are_drawn_with_those_of_the_last() -> None:
    seen = looking_stages(score=2.0)
    looking = dataclasses.replace(LOOKING[2], values=LOOKING[2].values[:1])
    panel, _ = stage_panels(
        Image.new("RGB", (96, 64)),
        dataclasses.replace(seen, metadata=toy_metadata(stages=(LOOKING[0], looking, LOOKING[3]))),
        0.3,
    )
    assert panel.caption == "head: 2; where the best 1 look, in a colour each"
    assert (np.asarray(panel.picture)[240, 120] == class_colour(0)).all()


def test_points_of_what_is_not_found_are_not_drawn() -> None:
    panels = stage_panels(Image.new("RGB", (96, 64)), looking_stages(score=-2.0), 0.3)
    assert panels[0].caption == "layer 0: 2"
    assert not (np.asarray(panels[0].picture) == class_colour(0)).all(axis=2).any()


PLACED = (
    Stage("features", (Value("map", "maps"),)),
    Stage("layer", (Value("looks", "gaussians"), Value("points", "points", frame="content"), Value("boxes", "boxes"))),
    LOOKING[-1],
)


@pytest.mark.parametrize("score", [2.0, -2.0])
def test_the_gaussians_of_the_best_are_warm_and_all_own_points_are_drawn(score: float) -> None:
    """A query's only point is its own place; the second query looks at (12, 8) of an input of half the image's size."""
    seen = looking_stages(score)
    values = {
        **{name: seen.values[name] for name in ("sizes", "head/logits", "head/boxes")},
        "layer/looks": np.array([[[[40, 20, 1, 1]], [[12, 8, 0.5, 0.5]]]], np.float32),
        "layer/points": np.array([[[0.75, 0.25], [0.25, 0.75]]], np.float32),
        "layer/boxes": seen.values["layer_0/boxes"],
    }
    seen = SeenStages(values, seen.detections, toy_metadata(stages=PLACED))
    *warm, placed, _ = stage_panels(Image.new("RGB", (96, 64)), seen, 0.3)
    pixels = np.asarray(placed.picture)
    assert (pixels[80, 360] == BOX_COLOUR).all()
    assert (pixels[240, 120] == (class_colour(0) if score > 0 else BOX_COLOUR)).all()
    assert [panel.caption for panel in warm] == ["layer: where the best detection looks, 1 heads"] * (score > 0)
    for panel in warm:
        heat = np.asarray(panel.picture).sum(axis=2)
        assert np.unravel_index(heat.argmax(), heat.shape) == (pytest.approx(80, abs=2), pytest.approx(120, abs=2))
        assert heat[80, 200] < heat[80, 140] < heat[80, 120]


def test_many_panels_stand_in_rows() -> None:
    layers = tuple(Stage(f"layer_{number}", (Value("boxes", "boxes"),), part="decoder") for number in range(6))
    seen = looking_stages(2.0)
    values = {**seen.values, **{f"{layer.name}/boxes": seen.values["layer_0/boxes"] for layer in layers}}
    seen = SeenStages(values, seen.detections, toy_metadata(stages=(LOOKING[0], *layers, LOOKING[-1])))
    picture = draw_stages(Image.new("RGB", (96, 64)), seen, 0.3)
    assert 4 * 480 < picture.width < 5 * 480
    assert 2 * 320 < picture.height < 3 * 320


def test_no_places_and_nothing_found() -> None:
    nothing = {name: np.zeros_like(value) for name, value in one_of_each().items() if name.endswith("/valid")}
    seen = seen_stages(**nothing)
    empty = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), 0, (64, 96))
    seen = dataclasses.replace(seen, detections=empty)
    assert [panel.caption for panel in stage_panels(Image.new("RGB", (96, 64)), seen, 0.3)] == [
        "coarse patches: 0, fine patches: 0",
        "anchors: 0",
        "proposals: 0 of 0 score at least 0.3",
        "detections: 0 of 0 score at least 0.3",
    ]
    assert draw_stages(Image.new("RGB", (96, 64)), seen, 0.3).height > 80


def test_a_model_that_names_nothing_to_draw_has_its_detections() -> None:
    bare = SeenStages({"sizes": one_of_each()["sizes"]}, seen_stages().detections, toy_metadata(stages=STAGES[:1]))
    (panel,) = stage_panels(Image.new("RGB", (96, 64)), bare, 0.3)
    assert panel.caption == "detections: 1 of 1 score at least 0.3"


def test_values_that_are_no_numbers_are_not_drawn() -> None:
    boxes = one_of_each()["anchors/boxes"] * np.nan
    panels = stage_panels(Image.new("RGB", (96, 64)), seen_stages(**{"anchors/boxes": boxes}), 0.3)
    assert not (np.asarray(panels[1].picture) == BOX_COLOUR).all(axis=2).any()


@pytest.mark.parametrize(("height", "width"), [(1, 700), (700, 1), (3, 2), (900, 1400)])
def test_any_image_gives_a_legible_picture(height: int, width: int) -> None:
    sizes = np.array([[max(1, height // 2), max(1, width // 2)]], np.float32)
    seen = seen_stages((height, width), sizes=sizes)
    picture = draw_stages(Image.new("RGB", (width, height), "blue"), seen, 0.3)
    assert picture.width >= 4 * 300
    assert picture.height >= 80


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return open_session(write_checkpoint(tmp_path_factory.mktemp("stages") / "small.safetensors", random_detector()))


def test_stages_end_in_the_detections_of_the_same_session(session: Session) -> None:
    for seed, size in enumerate([(160, 192), (90, 300), (41, 33)]):
        picture = random_picture(seed, *size)
        seen, (found,) = session.stages(picture), session.detect([picture])
        assert len(found) > 0
        assert np.array_equal(seen.detections.labels, found.labels)
        assert np.allclose(seen.detections.scores, found.scores, atol=1e-6)
        assert np.allclose(seen.detections.boxes, found.boxes, atol=1e-2)
        assert seen.detections.overflow == found.overflow
        count = int(seen.values["anchors/valid"].sum())
        captions = [panel.caption for panel in stage_panels(Image.fromarray(picture), seen, 0.3)]
        assert captions[1] == f"anchors: {count}"
        assert count > 0
        assert f" of {count} score" in captions[2]
        for level, room in zip(("P4", "P3"), session.metadata.choices["patch_capacity"], strict=True):
            assert f"{level} patches: {int(seen.values[f'{level}_patches/valid'].sum())}" in captions[0]
            assert seen.values[f"{level}_patches/valid"].sum() <= room


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
    with pytest.raises(ValueError, match=r"toy\.onnx gives detections only"):
        session.stages(tmp_path / "image.png")


class StagedToySession(ToySession):
    """The toy with the stages of the tests above."""

    shows_stages = True

    def __init__(self) -> None:
        super().__init__(METADATA)

    def stage_values(self, tensors):  # type: ignore[no-untyped-def]
        return one_of_each() | self.run(tensors)


def test_the_report_shows_stages_where_the_reference_has_them(tmp_path: Path) -> None:
    dataset = write_toy_dataset(tmp_path / "data", images=5)
    for reference, expected in ((StagedToySession(), 2 * 4 + 3 * 4), (ToySession(), 2 * 4), (None, 2 * 4)):
        result = compare(ToySession(), [], dataset)
        document = make_document(result, dataset, pictures=4, reference=reference)
        page = write_page(tmp_path / "report.html", [document]).read_text()
        assert page.count("<img ") == expected
        assert ("coarse patches: 1, fine patches: 0" in page) == (expected > 2 * 4)
