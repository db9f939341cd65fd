"""How far two runs are apart at a stage: each kind of value by itself, with differences of known size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from asag.family import Kind, Stage, Value
from asag.runtime.stages.compare import Difference, stage_differences

SIDE = 200.0
"""Longer side of the input in pixels."""

GENERATOR = np.random.default_rng(0)
SHAPES: dict[Kind, tuple[int, ...]] = {
    "maps": (1, 3, 4, 5),
    "boxes": (1, 6, 4),
    "points": (1, 6, 2),
    "gaussians": (1, 6, 2, 4),
    "queries": (1, 6, 8),
    "scores": (1, 6, 3),
}


def differences(value: Value, reference: NDArray, candidate: NDArray) -> Difference:
    """Of a stage with this value alone."""
    found = stage_differences([Stage("one", (value,))], {"one/v": reference}, {"one/v": candidate}, SIDE)
    return found["one"]


def whole_numbers(kind: Kind) -> NDArray[np.float32]:
    return GENERATOR.integers(1, 100, SHAPES[kind]).astype(np.float32)


@pytest.mark.parametrize("kind", ["maps", "queries"])
def test_vectors_are_compared_with_their_largest_magnitude(kind: Kind) -> None:
    reference = whole_numbers(kind)
    reference.flat[3] = -400
    candidate = reference.copy()
    candidate.flat[7] += 2
    largest, mean, unmatched = differences(Value("v", kind), reference, candidate)
    assert (largest, unmatched) == (pytest.approx(2 / 400), 0)
    assert mean == pytest.approx(2 / 400 / reference.size)


@pytest.mark.parametrize(("frame", "expected"), [("input", 3 / SIDE), ("content", 3.0)])
@pytest.mark.parametrize("kind", ["boxes", "points"])
def test_places_in_the_image_are_compared_with_its_side(kind: Kind, frame: str, expected: float) -> None:
    reference = whole_numbers(kind)
    candidate = reference.copy()
    candidate.flat[5] -= 3
    value = Value("v", kind, frame=frame)  # type: ignore[arg-type]
    assert differences(value, reference, candidate)[0] == pytest.approx(expected)


def test_points_have_any_axes_a_unit_and_a_logarithm() -> None:
    reference = GENERATOR.random((1, 6, 2, 3, 3))
    value = Value("v", "points", unit=4)
    for axis, expected in ((0, 0.5 * 4 / SIDE), (1, 0.5 * 4 / SIDE), (2, 0.5)):
        candidate = reference.copy()
        candidate[0, 4, 1, 2, axis] += 0.5
        assert differences(value, reference, candidate)[0] == pytest.approx(expected)


def test_gaussians_centres_are_compared_with_the_side_and_their_widths_with_the_steepest() -> None:
    reference = GENERATOR.random((1, 6, 2, 4))
    reference[0, 3, 1, 2] = -4
    for axis, expected in ((0, 0.5 / SIDE), (1, 0.5 / SIDE), (2, 0.5 / 4), (3, 0.5 / 4)):
        candidate = reference.copy()
        candidate[0, 4, 1, axis] += 0.5
        assert differences(Value("v", "gaussians"), reference, candidate)[0] == pytest.approx(expected)


def test_a_box_s_confidence_is_compared_as_it_is() -> None:
    reference = GENERATOR.random((1, 6, 5))
    candidate = reference.copy()
    candidate[0, 2, 4] += 0.25
    assert differences(Value("v", "boxes"), reference, candidate)[0] == pytest.approx(0.25)


def test_scores_are_compared_after_the_sigmoid() -> None:
    reference = np.zeros(SHAPES["scores"], np.float32)
    candidate = reference.copy()
    candidate[0, 1, 1] = np.log(3)  # a score of 0.75
    assert differences(Value("v", "scores"), reference, candidate)[0] == pytest.approx(0.25)
    far = np.full_like(reference, -1e5)
    assert differences(Value("v", "scores"), far, far * 2) == (0.0, 0.0, 0), "no overflow, and no difference"


@pytest.mark.parametrize("kind", ["places", "cells", "valid"])
def test_what_is_equal_or_not_is_counted(kind: Kind) -> None:
    values = {"places": np.arange(12).reshape(1, 6, 2), "cells": np.arange(1, 7)[None], "valid": np.ones((1, 6), bool)}
    reference = values[kind]
    candidate = reference.copy()
    candidate[0, [1, 4]] = 0
    assert differences(Value("v", kind), reference, candidate) == (0.0, 0.0, 2)


@pytest.mark.parametrize("kind", SHAPES)
def test_what_is_no_number_or_of_another_shape_is_infinitely_far(kind: Kind) -> None:
    reference = whole_numbers(kind)
    candidate = reference.copy()
    candidate.flat[2] = np.nan
    assert differences(Value("v", kind), reference, candidate)[:2] == (math.inf, math.inf)
    assert differences(Value("v", kind), reference, reference)[:2] == (0.0, 0.0)
    assert differences(Value("v", kind), reference, reference[:, :-1])[0] == math.inf


PLACES = Stage("patches", (Value("corners", "places"), Value("valid", "valid"), Value("map", "maps")), aligns=True)
CELLS = Stage("kept", (Value("cells", "cells"), Value("valid", "valid")), aligns=True)
BOXES = Stage("anchors", (Value("boxes", "boxes"), Value("valid", "valid")), aligns=True)
QUERIES = Stage("head", (Value("queries", "queries"),))


def rows(stage: Stage, count: int = 5) -> dict[str, NDArray]:
    """A run of an aligning stage with so many rows, of which the last does not exist, and of the queries after it."""
    generator = np.random.default_rng(1)
    values: dict[str, NDArray] = {
        f"{stage.name}/valid": np.arange(count)[None] < count - 1,
        "head/queries": generator.random((1, count, 4)),
    }
    if stage is PLACES:
        return values | {
            "patches/corners": np.stack((np.arange(count), 3 * np.arange(count)), axis=1)[None],
            "patches/map": np.ones((1, 2, 3, 3)),
        }
    if stage is CELLS:
        return values | {"kept/cells": 7 * np.arange(count)[None]}
    centres = 30.0 * np.arange(1, count + 1)
    return values | {"anchors/boxes": np.stack((centres, centres, centres / 2, centres / 3), axis=1)[None]}


def compare(stage: Stage, reference: dict[str, NDArray], candidate: dict[str, NDArray]) -> dict[str, Difference]:
    return stage_differences([stage, QUERIES], reference, candidate, SIDE)


def by_row(values: dict[str, NDArray], order: list[int]) -> dict[str, NDArray]:
    return {name: value if name.endswith("/map") else value[:, order] for name, value in values.items()}


@pytest.mark.parametrize("stage", [PLACES, CELLS, BOXES], ids=["places", "cells", "boxes"])
def test_another_order_is_no_difference_there_nor_after(stage: Stage) -> None:
    reference = rows(stage)
    found = compare(stage, reference, by_row(reference, [3, 4, 1, 0, 2]))
    assert found == {stage.title: (0.0, 0.0, 0), "head": (0.0, 0.0, 0)}


@pytest.mark.parametrize("stage", [PLACES, CELLS, BOXES], ids=["places", "cells", "boxes"])
def test_a_row_that_only_one_side_has_is_unmatched(stage: Stage) -> None:
    reference = rows(stage)
    fewer = {**reference, f"{stage.name}/valid": np.array([[True, False, True, True, False]])}
    assert compare(stage, reference, fewer) == {stage.title: (0.0, 0.0, 1), "head": (0.0, 0.0, 0)}
    assert compare(stage, fewer, reference)[stage.title] == (0.0, 0.0, 1)
    # Another capacity is no difference as long as the rows that exist are the same.
    more = by_row(rows(stage), [0, 1, 2, 3, 4, 4, 4])
    assert compare(stage, reference, more) == {stage.title: (0.0, 0.0, 0), "head": (0.0, 0.0, 0)}


def test_rows_that_do_not_exist_do_not_count() -> None:
    reference = rows(BOXES)
    other = {name: value.copy() for name, value in reference.items()}
    other["anchors/boxes"][0, 4] = np.nan
    other["head/queries"][0, 4] = np.nan
    assert compare(BOXES, reference, other) == {"anchors": (0.0, 0.0, 0), "head": (0.0, 0.0, 0)}


def test_a_moved_place_is_another_one_and_a_box_is_the_nearest() -> None:
    places, boxes = rows(PLACES), rows(BOXES)
    moved = {**places, "patches/corners": places["patches/corners"] + np.array([[[0, 0], [1, 0], *[[0, 0]] * 3]])}
    assert compare(PLACES, places, moved)["patches"] == (0.0, 0.0, 2), "one of each side stands alone"
    shifted = {name: value.copy() for name, value in boxes.items()}
    shifted["anchors/boxes"][0, 2, 0] += 1.0
    largest, _, unmatched = compare(BOXES, boxes, by_row(shifted, [2, 1, 0, 3, 4]))["anchors"]
    assert (largest, unmatched) == (pytest.approx(1 / SIDE), 0)
    shifted["anchors/boxes"][0, 2, 0] += 5.0  # further than any box moves by rounding
    assert compare(BOXES, boxes, shifted)["anchors"] == (0.0, 0.0, 2)


def test_several_rows_of_a_later_stage_belong_to_one_that_was_paired() -> None:
    reference = rows(PLACES)
    reference["head/queries"] = np.arange(40.0).reshape(1, 10, 4)  # two for each patch
    order = [3, 4, 1, 0, 2]
    candidate = by_row({name: value for name, value in reference.items() if name != "head/queries"}, order)
    candidate["head/queries"] = reference["head/queries"].reshape(1, 5, 2, 4)[:, order].reshape(1, 10, 4)
    assert compare(PLACES, reference, candidate)["head"] == (0.0, 0.0, 0)


def test_a_stage_that_one_side_does_not_show_is_left_out() -> None:
    reference = rows(BOXES)
    anchors = {name: value for name, value in reference.items() if name.startswith("anchors/")}
    assert set(compare(BOXES, reference, anchors)) == {"anchors"}
    assert set(compare(BOXES, anchors, reference)) == {"anchors"}
