from __future__ import annotations

import dataclasses

import pytest

from asag.family import Stage, Value
from asag.runtime.metadata import ModelMetadata
from tests.runtime.toy_detector import toy_metadata


def test_properties_round_trip(metadata: ModelMetadata) -> None:
    changed = dataclasses.replace(metadata, nms_iou=0.7, category_names=("Kreis ○", 'a "b"', "ring"))
    properties = changed.to_properties()
    assert all(key.startswith("asag.") and isinstance(value, str) for key, value in properties.items())
    assert ModelMetadata.from_properties(properties | {"other": "x", "asag.later": "1"}) == changed


def test_lists_become_tuples(metadata: ModelMetadata) -> None:
    values = dataclasses.asdict(metadata) | {"category_ids": [1, 3, 7], "mean": [0.485, 0.456, 0.406]}
    assert ModelMetadata(**values) == metadata


def test_choices_compare_as_a_file_gives_them_back(metadata: ModelMetadata) -> None:
    assert metadata == dataclasses.replace(metadata, choices={"head": "main", "capacity": (8, 16)})
    assert metadata.choices["capacity"] == [8, 16]
    assert ModelMetadata.from_properties(metadata.to_properties()) == metadata


def test_stages_survive_their_file(metadata: ModelMetadata) -> None:
    places = Value("corners", "places", cell=(16, 15))
    stages = (
        Stage("features", (Value("p2", "maps"), Value("shown", "maps", exported=False))),
        Stage("far_patches", (places, Value("valid", "valid")), part="anchors", tolerance=1e-3, aligns=True),
    )
    changed = dataclasses.replace(metadata, stages=stages)
    assert ModelMetadata.from_properties(changed.to_properties()) == changed
    assert changed.parts == {"features": ("features/p2",), "anchors": ("far_patches/corners", "far_patches/valid")}
    assert stages[1].title == "far patches"


def test_category_names(metadata: ModelMetadata) -> None:
    assert metadata.category_name(3) == "square"
    assert metadata.category_name(2) == "2"


def test_files_without_the_fields_of_foreign_ones_mean_what_they_did(metadata: ModelMetadata) -> None:
    newer = ("resize", "interpolation", "layout", "source_digest", "replaced")
    older = {key: value for key, value in metadata.to_properties().items() if key.removeprefix("asag.") not in newer}
    found = ModelMetadata.from_properties(older)
    assert (found, found.resize, found.interpolation) == (metadata, "fit", "antialias")


def test_foreign_model_is_named_as_such() -> None:
    with pytest.raises(ValueError, match="not an asag model"):
        ModelMetadata.from_properties({"author": "somebody"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"asag.mean": "[1, 2"}, "damaged at asag.mean"),
        ({"asag.mean": "[1, 2]"}, "mean is .1, 2.; it must be a list of length 3"),
        ({"asag.mean": "7"}, "mean is 7; it must be a list"),
        ({"asag.std": "[0.1, 0, 0.1]"}, "std must be positive"),
        ({"asag.input_height": '"64"'}, "input_height is '64'; it must be a whole number"),
        ({"asag.input_height": "true"}, "input_height is True; it must be a whole number"),
        ({"asag.max_detections": "0"}, "max_detections is 0; it must be a whole number >= 1"),
        ({"asag.input_type": '"float16"'}, "input_type must be uint8 or float32"),
        ({"asag.category_ids": "[1, 1, 2]"}, "category ids repeat"),
        ({"asag.category_ids": "[]"}, "category_ids is .*; it must be a list of length >= 1"),
        ({"asag.category_names": '["a"]'}, "3 category ids but 1 category names"),
        ({"asag.nms_iou": "1.5"}, "nms_iou must be between 0 and 1"),
        ({"asag.resize": '"crop"'}, "resize must be fit or stretch, it is 'crop'"),
        ({"asag.interpolation": '"cubic"'}, "interpolation must be antialias or bilinear"),
        ({"asag.shorter_side": "2000"}, "larger than longer_side"),
        ({"asag.choices": "[]"}, "choices is .*; it must be"),
        ({"asag.stages": '[{"name": "a", "values": [{"name": "b", "kind": "magic"}]}]'}, "stages is .*"),
        ({"asag.schema": "3"}, "schema 3, written by a newer version .*: update asag"),
        ({"asag.schema": '"two"'}, "schema 'two', written by a newer version"),
    ],
)
def test_damaged_properties_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ModelMetadata.from_properties(toy_metadata().to_properties() | change)
    assert "\n" not in str(caught.value)


def test_keys_that_are_no_text_are_ignored(metadata: ModelMetadata) -> None:
    """As protobuf gives them for a damaged file."""
    damaged = {**metadata.to_properties(), b"\xffsag.mean": "1"}
    assert ModelMetadata.from_properties(damaged) == metadata  # type: ignore[arg-type]


def test_missing_field_is_named(metadata: ModelMetadata) -> None:
    properties = metadata.to_properties()
    del properties["asag.choices"]
    with pytest.raises(ValueError, match="lack choices"):
        ModelMetadata.from_properties(properties)
