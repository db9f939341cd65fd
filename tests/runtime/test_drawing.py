from __future__ import annotations

from itertools import pairwise

import numpy as np
from PIL import Image

from asag.runtime.drawing import Mark, class_colour, draw_detections, draw_marks
from asag.runtime.postprocessing import Detections
from tests.runtime.toy_detector import toy_metadata


def detections(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels), 0, (200, 300)
    )


def test_box_is_drawn_in_the_classes_colour() -> None:
    image = Image.new("RGB", (300, 200))
    drawn = draw_detections(image, detections([[50, 80, 250, 180]], [0.9], [3]), toy_metadata())
    assert drawn.getpixel((150, 180)) == class_colour(1)
    assert drawn.getpixel((250, 150)) == class_colour(1)
    assert drawn.getpixel((150, 130)) == (0, 0, 0)
    assert not np.asarray(image).any(), "the input is left as it was"


def test_boxes_follow_the_size_of_the_picture() -> None:
    drawn = draw_detections(Image.new("RGB", (150, 100)), detections([[50, 80, 250, 180]], [0.9], [3]), toy_metadata())
    assert drawn.getpixel((75, 90)) == class_colour(1)


def test_low_scores_are_not_drawn() -> None:
    drawn = draw_detections(Image.new("RGB", (300, 200)), detections([[5, 8, 90, 90]], [0.1], [1]), toy_metadata())
    assert not np.asarray(drawn).any()


def test_boxes_outside_and_inverted_do_no_harm() -> None:
    boxes = [[-50, -50, 500, 500], [290, 190, 400, 400], [100, 100, 50, 50], [-9, -9, -5, -5], [0, 0, 0, 0]]
    drawn = draw_detections(
        Image.new("RGB", (300, 200)), detections(boxes, [0.9] * 5, [1, 3, 7, 99, 1]), toy_metadata()
    )
    assert drawn.size == (300, 200)


def test_neighbouring_classes_differ() -> None:
    colours = [class_colour(index) for index in range(80)]
    assert len(set(colours)) == 80
    for one, other in pairwise(colours):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 100


def test_a_ring_surrounds_and_dashes_leave_gaps() -> None:
    image, box, green, red = Image.new("RGB", (300, 200)), np.array([60, 60, 240, 180.0]), (0, 255, 0), (226, 0, 26)

    def edge(**how: bool) -> list[tuple[int, ...]]:
        drawn = np.asarray(draw_marks(image, [Mark(box, "", green, **how)], (200, 300)))
        return [tuple(pixel) for pixel in drawn[180, 61:239].tolist()]

    assert set(edge()) == {green}
    assert set(edge(ringed=True)) == {green}, "the box itself stays"
    assert set(edge(dashed=True)) == {green, (0, 0, 0)}
    assert set(edge(dashed=True, ringed=True)) == {green, red}
