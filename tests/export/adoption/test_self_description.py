"""What a file says of its classes and pixels is believed where it can be understood."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from asag.datasets import COCO_CATEGORIES
from asag.export.adoption.adopt import AdoptionReport, adopt
from asag.export.adoption.plan import AdoptionOptions
from asag.export.adoption.self_description import SelfDescription, self_description
from tests.export.adoption.toy_peers import make_toy


def saying(**said: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    for key, value in said.items():
        proto.metadata_props.add(key=key, value=value)
    return proto


@pytest.mark.parametrize(
    ("said", "classes"),
    [
        ({"names": "{0: 'cat', 1: 'dog'}"}, {0: "cat", 1: "dog"}),
        ({"names": '{"0": "cat", "1": "dog"}', "classes": "80"}, {0: "cat", 1: "dog"}),
        ({"names": '["cat", "dog"]'}, {0: "cat", 1: "dog"}),
        ({"classes": '{"7": "dog", "3": "cat"}'}, {7: "dog", 3: "cat"}),
        ({"names": str(dict(enumerate(COCO_CATEGORIES.values())))}, COCO_CATEGORIES),
        ({"names": "open('x')"}, None),
        ({"names": "{"}, None),
        ({"names": "{}"}, None),
        ({"names": "['cat', 3]"}, None),
        ({"names": "{'cat': 0}"}, None),
        ({}, None),
    ],
)
def test_classes(said: dict[str, str], classes: dict[int, str] | None) -> None:
    found = self_description(saying(**said)).classes
    assert found == classes
    assert found is None or list(found) == list(classes or ())  # the order is that of the columns


def test_normalization() -> None:
    said = '{"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 1]}'
    assert self_description(saying(image_normalize=said)).normalization == ((0.4, 0.5, 0.6), (0.2, 0.25, 1.0))
    for odd in (
        said.replace("0.4", "104"),
        said.replace("0.2", "0"),
        said.replace("0.4,", ""),
        said.replace("0.4", "null"),
        said.replace("std", "deviation"),
        "none",
    ):
        assert self_description(saying(image_normalize=odd)) == SelfDescription()


def adopted(folder: Path, layout: str, classes: str | None = None, **said: str) -> AdoptionReport:
    proto = make_toy(layout)
    proto.metadata_props.extend(saying(**said).metadata_props)
    onnx.save(proto, folder / "foreign.onnx")
    named = "ultralytics6" if layout == "ultralytics6" else None
    return adopt(folder / "foreign.onnx", folder / "adopted.onnx", AdoptionOptions(layout=named, classes=classes))


def test_adoption_believes_it_where_nobody_says_otherwise(tmp_path: Path) -> None:
    names = "{3: 'a', 1: 'b', 4: 'c', 15: 'd', 9: 'e'}"
    report = adopted(
        tmp_path, "ultralytics6", names=names, image_normalize="{'mean': [0.4, 0.5, 0.6], 'std': [0.2, 0.25, 1]}"
    )
    metadata = report.metadata
    assert (metadata.category_ids, metadata.category_names) == ((3, 1, 4, 15, 9), tuple("abcde"))
    assert (metadata.mean, metadata.std) == ((0.4, 0.5, 0.6), (0.2, 0.25, 1.0))
    assert "classes are the 5 that the file names; --classes changes them" in report.assumed
    (tmp_path / "classes.txt").write_text("\n".join("vwxyz"))
    assert adopted(
        tmp_path, "ultralytics6", str(tmp_path / "classes.txt"), names=names
    ).metadata.category_names == tuple("vwxyz")
    assert adopted(tmp_path, "transformers", names="['a', 'b']").metadata.category_ids == (0, 1, 2, 3, 4)
