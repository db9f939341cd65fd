from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from asag.runtime import open_session
from asag.runtime.coco_dataset import CocoFolder, open_coco
from benchmarks.padding_cost import measure_padding, native_size, padded_size
from tests.builders import CATEGORY_IDS, CATEGORY_NAMES, random_picture, write_checkpoint
from tests.runtime.toy_detector import ToySession, toy_metadata, write_toy_dataset


def write_dataset(root: Path, sizes: list[tuple[int, int]]) -> CocoFolder:
    """Random pictures with one object each."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    images, annotations = [], []
    for number, (height, width) in enumerate(sizes, start=1):
        Image.fromarray(random_picture(number, height, width)).save(root / "val2017" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        box = [2, 2, width / 2, height / 2]
        annotations.append({"id": number, "image_id": number, "category_id": CATEGORY_IDS[0], "bbox": box})
    categories = [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, CATEGORY_NAMES, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return open_coco(root)


def test_sizes() -> None:
    metadata = toy_metadata(shorter_side=800, longer_side=1333, input_height=800, input_width=1344)
    upright = Image.new("RGB", (480, 640))
    assert native_size(upright, metadata) == (1066, 800)
    assert padded_size((1066, 800), (800, 1344)) == (1344, 800)
    assert padded_size((800, 1066), (800, 1344)) == (800, 1344)
    assert padded_size((800, 1500), (800, 1344)) == (800, 1500)


def test_an_image_that_fills_the_input_costs_nothing(tmp_path: Path) -> None:
    session = open_session(write_checkpoint(tmp_path / "small.safetensors"))
    cost = measure_padding(session, write_dataset(tmp_path / "full", [(160, 192), (80, 96)]))
    assert (cost.images, cost.shrunk) == (2, 0)
    assert [row.kept for row in cost.rows[1:]] in ([1.0, 1.0], [None, None])
    assert cost.rows[0].result == cost.rows[1].result == cost.rows[2].result


def test_an_upright_image_is_padded_or_shrunk(tmp_path: Path) -> None:
    session = open_session(write_checkpoint(tmp_path / "small.safetensors"), input_size=(160, 256))
    seen: list[tuple[int, int]] = []
    cost = measure_padding(
        session, write_dataset(tmp_path / "upright", [(120, 90), (90, 120)]), progress=lambda *at: seen.append(at)
    )
    assert cost.shrunk == 1
    assert [row.name for row in cost.rows] == ["own size", "padded to the fixed size", "fixed 160x256"]
    assert seen == [(1, 2), (2, 2)]


def test_a_fixed_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="toy gives detections only: stages are seen in a checkpoint"):
        measure_padding(ToySession(), write_toy_dataset(tmp_path / "data", images=1))
