"""Adoption from end to end, on small detectors that are exported as other tools export theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from PIL import Image

from asag.export.adoption.adopt import AdoptionReport, adopt
from asag.export.adoption.comparison import SAME, Comparison, compare_files, missing
from asag.export.adoption.graph import all_graphs
from asag.export.adoption.pictures import made_up
from asag.export.adoption.plan import AdoptionOptions
from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.metadata import ModelMetadata
from asag.runtime.opening import open_session
from asag.runtime.parity.agreement import compare_detections
from asag.runtime.parity.comparison import compare
from asag.runtime.postprocessing import Detections
from asag.runtime.preprocessing import resize, resized_size
from tests.export.adoption.toy_peers import CLASSES, PORTS, Attention, make_toy, toy_of
from tests.runtime import layouts

SIZE = (64, 96)
FUSED, ALONE = {"MultiScaleDeformableAttention": 2}, {"SampleGrid": 6}
IMAGENET = {"masked", "rfdetr", "mmdeploy"}


@pytest.fixture
def classes(tmp_path: Path) -> str:
    path = tmp_path / "classes.txt"
    path.write_text("\n".join("abcde"))
    return str(path)


def adopted(proto: onnx.ModelProto, folder: Path, **options: Any) -> AdoptionReport:
    onnx.save(proto, folder / "foreign.onnx")
    return adopt(folder / "foreign.onnx", folder / "adopted.onnx", AdoptionOptions(**options))


def operators(path: Path) -> set[str]:
    return {node.op_type for graph in all_graphs(onnx.load(path).graph) for node in graph.node}


def as_its_user(layout: str, picture: Image.Image) -> Detections:
    """What a user of the PyTorch model finds: written anew from what the layouts mean, without the exported file."""
    height, width = SIZE
    content = SIZE
    if layout in ("masked", "mmdeploy"):
        content = resized_size(picture.height, picture.width, *SIZE, limit=SIZE)
    if layout in ("dfineseg", "rfdetr", "ultralytics", "ultralytics6"):
        whole = torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1)[None]
        pixels = F.interpolate(whole, SIZE, mode="bilinear", align_corners=False)[0].round()
    else:
        pixels = torch.from_numpy(np.asarray(resize(picture, content), np.float32)).permute(2, 0, 1)
    pixels = pixels / 255
    if layout in IMAGENET:
        pixels = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]
        ).view(3, 1, 1)
    image = torch.zeros(1, 3, height, width)
    image[0, :, : content[0], : content[1]] = pixels
    inside = torch.zeros(1, height, width, dtype=torch.int64)
    inside[0, : content[0], : content[1]] = 1
    with torch.no_grad():
        logits, boxes = toy_of()(image, inside) if layout == "masked" else toy_of()(image)
    scores = logits[0].sigmoid().flatten()
    order = scores.argsort(descending=True)[: len(boxes[0])]
    x, y, w, h = boxes[0][order // CLASSES].unbind(-1)
    corners = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), -1)
    if layout == "mmdeploy":  # pixels of the input, of which the content is a part
        corners = corners * torch.tensor([width, height] * 2) / torch.tensor([content[1], content[0]] * 2)
    corners = corners * torch.tensor([picture.width, picture.height] * 2)
    size = (picture.height, picture.width)
    return Detections(corners.numpy(), scores[order].numpy(), (order % CLASSES).numpy(), 0, size)


@pytest.mark.parametrize("layout", PORTS)
def test_every_layout(layout: str, tmp_path: Path, classes: str) -> None:
    """Recognised, rewritten, and what its user would have found: one by one, and in batches."""
    wanted = "ultralytics6" if layout == "ultralytics6" else None
    report = adopted(make_toy(layout), tmp_path, classes=classes, layout=wanted)
    assert report.metadata.layout == layout.replace("masked", "transformers")
    assert (report.metadata.replaced, report.warnings) == (FUSED, ())
    assert "GridSample" not in operators(report.path)
    assert report.comparison.found == report.comparison.detections > 100
    pictures = [made_up(number, SIZE) for number in range(20, 23)]
    with open_session(report.path, threads=1) as session:
        assert session.metadata == report.metadata
        assert session.metadata.category_names == tuple("abcde")
        together = session.detect([np.asarray(picture) for picture in pictures])
        for picture, found in zip(pictures, together, strict=True):
            agreement = compare_detections(0, as_its_user(layout, picture), found, len(found))
            assert agreement.within(1e-5, 2e-3), agreement


def test_kept_grid_samples_are_the_reference(tmp_path: Path) -> None:
    report = adopted(make_toy(), tmp_path, keep_grid_sample=True)
    assert (report.metadata.replaced, report.samples) == ({}, 6)
    assert "6 GridSample kept" in report.summary()
    assert "GridSample" in operators(report.path)


def test_parity_with_the_reference_in_batches(tmp_path: Path) -> None:
    layouts.coco(tmp_path / "data")
    for number, path in enumerate((tmp_path / "data" / "val2017").iterdir()):
        made_up(number, SIZE).resize(layouts.SIDES).save(path)
    classes = str(tmp_path / "data" / "annotations" / "instances_val2017.json")
    onnx.save(make_toy("masked", columns=2), tmp_path / "foreign.onnx")
    sessions = []
    for name, keep in (("reference", True), ("adopted", False)):
        options = AdoptionOptions(classes=classes, keep_grid_sample=keep)
        adopt(tmp_path / "foreign.onnx", tmp_path / f"{name}.onnx", options)
        sessions.append(open_session(tmp_path / f"{name}.onnx", threads=1))
    report = compare(sessions[0], sessions[1:], CocoFolder(tmp_path / "data" / "val2017", classes), batch_sizes=(1, 3))
    assert report.agrees
    assert [(check.batch, check.differing, check.compared > 0) for check in report.batch_checks] == [(3, (), True)] * 4


@pytest.mark.parametrize(
    ("operator_set", "batch", "size"), [(16, 1, (64, 96)), (18, None, (96, 64)), (20, None, (32, 32))]
)
def test_operator_sets_batches_and_sizes(
    operator_set: int, batch: int | None, size: tuple[int, int], tmp_path: Path
) -> None:
    report = adopted(make_toy(operator_set=operator_set, batch=batch, size=size), tmp_path)
    assert report.metadata.replaced == FUSED
    with open_session(report.path, threads=1) as session:
        assert (session.max_batch, session.metadata.input_size) == (batch, size)


def test_a_fixed_batch_takes_fewer_pictures(tmp_path: Path) -> None:
    report = adopted(make_toy(batch=2), tmp_path)
    pictures = [np.asarray(made_up(number, SIZE)) for number in range(20, 23)]
    with open_session(report.path, threads=1) as session:
        alone = [session.detect([picture])[0] for picture in pictures]
        for one, other in zip(alone, session.detect(pictures[:2]), strict=False):
            assert compare_detections(0, one, other, len(other)).within(1e-5, 2e-3)


@pytest.mark.parametrize(("width", "shift", "lacking"), [(0.5, 0.002, 0), (0.5, 0.02, 1), (50, 0.02, 0), (50, 0.2, 1)])
def test_boxes_less_than_a_pixel_wide_are_compared_by_their_corners(width: float, shift: float, lacking: int) -> None:
    def at(x: float) -> Detections:
        box = np.array([[x, 5, x + width, 25]], np.float32)
        return Detections(box, np.array([0.5], np.float32), np.array([3]), 0, (100, 100))

    assert missing(at(10), at(10 + shift), 300, SAME)[0] == lacking


def test_boxes_that_are_no_pixels_are_told(tmp_path: Path, classes: str) -> None:
    proto = make_toy("rtdetr")
    sizes = next(value for value in proto.graph.input if value.name == "orig_target_sizes")
    proto.graph.input.remove(sizes)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((2, 2), np.int64), sizes.name))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(ValueError, match="boxes are no pixels of the input, none passes"):
        adopted(proto, tmp_path, classes=classes)


def test_open_height_and_width_are_fixed(tmp_path: Path) -> None:
    proto = make_toy()
    for place, name in ((2, "height"), (3, "width")):
        proto.graph.input[0].type.tensor_type.shape.dim[place].dim_param = name
    with pytest.raises(ValueError, match="height and width are not fixed; give --input-size"):
        adopted(proto, tmp_path)
    assert adopted(proto, tmp_path, input_size=SIZE).metadata.replaced == FUSED


def sampling(**options: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    chosen = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": False, **options}
    return lambda maps, grid: F.grid_sample(maps, grid, **chosen)


def cat(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(samples, -1)


TRAPS: dict[str, tuple[Attention, dict[str, int]]] = {
    "weights on the left": (Attention(total=lambda s, w: (w * cat(s)).sum(-1)), FUSED),
    "two concatenations": (Attention(total=lambda s, w: (cat([cat(s[:2]), s[2]]) * w).sum(-1)), FUSED),
    "swapped levels": (Attention(total=lambda s, w: (cat(s[::-1]) * w).sum(-1)), FUSED),
    "another step to the grid": (Attention(grid=lambda places: 2 * places - 0.5), FUSED),
    "levels summed alone": (
        Attention(total=lambda s, w: sum((a * b).sum(-1) for a, b in zip(s, w.split(3, -1), strict=True))),
        {"MultiScaleDeformableAttention": 6},
    ),
    "a second reader of a sample": (Attention(total=lambda s, w: (cat(s) * w).sum(-1) + s[0].mean(-1)), ALONE),
    "a second concatenation": (Attention(total=lambda s, w: (cat(s) * w).sum(-1) + cat(s).amax(-1)), ALONE),
    "points turned round": (Attention(total=lambda s, w: (cat([s[0], s[1].flip(-1), s[2]]) * w).sum(-1)), ALONE),
    "weights of each channel": (Attention(total=lambda s, w: (cat(s) * w.repeat(1, 8, 1, 1)).sum(-1)), ALONE),
    "the border around maps": (Attention(sampling=sampling(padding_mode="border")), ALONE),
    "aligned corners": (Attention(sampling=sampling(align_corners=True)), ALONE),
}


@pytest.mark.parametrize("name", TRAPS)
def test_what_is_no_attention_is_sampled_alone_and_nothing_is_wrong(name: str, tmp_path: Path) -> None:
    attention, replaced = TRAPS[name]
    report = adopted(make_toy(attention=attention), tmp_path)
    assert report.metadata.replaced == replaced
    assert report.comparison.found == report.comparison.detections > 100


@pytest.mark.parametrize(
    ("options", "what"), [({"mode": "nearest"}, "mode nearest"), ({"padding_mode": "reflection"}, "padding reflection")]
)
def test_other_samples_are_kept_and_said(options: dict[str, str], what: str, tmp_path: Path) -> None:
    proto = make_toy(attention=Attention(sampling=sampling(**options)))
    assert adopted(proto, tmp_path).warnings == (f"6 GridSample with {what} kept",)
    with pytest.raises(ValueError, match=f"GridSample with {what} has no replacement"):
        adopted(proto, tmp_path, strict=True)


def test_queries_that_are_all_the_same_hide_nothing(tmp_path: Path) -> None:
    """Equal numbers of a picture do not tell places apart; the random ones do."""
    proto = make_toy(same_queries=True)
    assert adopted(proto, tmp_path).metadata.replaced == FUSED


def test_softmax_leaves_the_last_class_out(tmp_path: Path, classes: str) -> None:
    report = adopted(make_toy(columns=6), tmp_path, activation="softmax", classes=classes)
    assert report.metadata.category_names == tuple("abcde")
    assert report.comparison.found == report.comparison.detections


def test_a_lost_detection_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asag.export.adoption.adopt.confirm", lambda proto, proposed, occasion: wrong(proposed))
    with pytest.raises(ValueError, match=r"\d+ of \d+ detections differ, first in made-up picture 0; nothing was"):
        adopted(make_toy(), tmp_path)
    assert not (tmp_path / "adopted.onnx").exists()


def test_queries_that_nearly_tie_get_a_second_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few pictures differ, rounding may have chosen other queries: then image by image, nothing rewritten."""
    pictures: tuple[str, ...] = ("a", "b")
    looks = []

    def first_differs(*arguments: Any, **options: Any) -> Comparison:
        looks.append(options.get("at_once", 2))
        found = compare_files(*arguments, **options)
        return dataclasses.replace(found, differing=pictures) if len(looks) == 1 else found

    monkeypatch.setattr("asag.export.adoption.adopt.compare_files", first_differs)
    assert adopted(make_toy(), tmp_path).comparison.differing == ()
    assert looks == [2, 1]
    looks.clear()
    pictures = ("a", "b", "c", "d")  # of six
    with pytest.raises(ValueError, match="detections differ, first in a; nothing was written"):
        adopted(make_toy(), tmp_path)


def wrong(proposed: Any) -> tuple[Any, ...]:
    """Attentions with the points of two levels taken for each other's."""
    return tuple(dataclasses.replace(one, level_shapes=one.level_shapes[::-1]) for one in proposed)


def test_boxes_in_pixels_are_not_of_a_layout_of_fractions(tmp_path: Path) -> None:
    proto = make_toy("ultralytics")
    proto.graph.node.append(onnx.helper.make_node("Mul", ["output0", "hundred"], ["pixels"]))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(100), "hundred"))
    proto.graph.output[0].name = "pixels"
    with pytest.raises(ValueError, match="not 0 to 1: it is not of layout ultralytics"):
        adopted(proto, tmp_path)


def test_metadata_of_an_adopted_file(tmp_path: Path) -> None:
    report = adopted(make_toy("masked"), tmp_path)
    found = report.metadata
    assert (found.family, found.resize, found.interpolation) == ("foreign", "fit", "antialias")
    assert len(found.source_digest) == 64
    assert ModelMetadata.from_properties(found.to_properties()) == found
    lines = " ".join(report.assumed)
    assert "ImageNet" in lines
    assert "classes are called 0..4; --classes names them" in lines
