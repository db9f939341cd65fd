from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from rich.console import Console

from asag.runtime.backends.onnxruntime_session import OnnxRuntimeSession
from asag.runtime.backends.pytorch_session import PyTorchSession
from asag.runtime.coco_dataset import CocoFolder, open_coco
from asag.runtime.parity.stage_comparison import StageReport, can_compare, compare_stages, stage_table
from asag.runtime.stages.graph import DETECTIONS
from asag.runtime.stages.onnx import OnnxStages
from tests.builders import random_picture
from tests.exports import small_export

Edit = Callable[[onnx.ModelProto], None]
IMAGES = 3


class Models:
    """A random detector in PyTorch and as an ONNX file, and pictures."""

    def __init__(self, folder: Path, **changes: str) -> None:
        exported = small_export(**changes)
        self.path = exported.write(folder / "model.onnx")
        self.reference = PyTorchSession(exported.deployed, "model.safetensors")
        self.dataset = _pictures(folder / "data", exported.metadata.category_ids)

    def compare(self, path: Path | None = None) -> StageReport:
        candidate = OnnxRuntimeSession(path or self.path, threads=1)
        return compare_stages(self.reference, candidate, self.dataset, self.dataset.image_ids)

    @property
    def stages(self) -> list[str]:
        return [*(stage.title for stage in self.reference.metadata.stages), DETECTIONS]

    def broken(self, path: Path, edit: Edit) -> Path:
        model = onnx.load(self.path)
        edit(model)
        onnx.save(model, path)
        return path


def _pictures(root: Path, category_ids: tuple[int, ...]) -> CocoFolder:
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    records = []
    for number in range(1, IMAGES + 1):
        picture = random_picture(number, 150, 190)
        Image.fromarray(picture).save(root / "val2017" / f"{number}.png")
        records.append({"id": number, "file_name": f"{number}.png", "height": 150, "width": 190})
    categories = [{"id": number, "name": str(number)} for number in category_ids]
    content = {"images": records, "annotations": [], "categories": categories}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return open_coco(root)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    torch.set_num_threads(1)
    return Models(tmp_path_factory.mktemp("stages"))


def shifted(name: str, amount: float = 0.05) -> Edit:
    """Add a pattern to a parameter; a constant could vanish in the norm after it."""

    def edit(model: onnx.ModelProto) -> None:
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        values: NDArray = numpy_helper.to_array(tensor).copy()
        values += (amount * (1 + np.arange(values.size) % 3)).reshape(values.shape).astype(values.dtype)
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return edit


def fewer_anchors(model: onnx.ModelProto) -> None:
    (node,) = [node for node in model.graph.node if node.op_type == "GatherAnchors"]
    (attribute,) = [attribute for attribute in node.attribute if attribute.type == onnx.AttributeProto.FLOAT]
    attribute.f = 0.5


def swapped_categories(model: onnx.ModelProto) -> None:
    (tensor,) = [t for t in model.graph.initializer if list(numpy_helper.to_array(t).flatten()) == [1, 3, 7]]
    values = numpy_helper.to_array(tensor)[::-1].copy()
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


BREAKS: dict[str, Edit] = {
    "features": shifted("detector.neck.layer_blocks.1.0.bias"),
    "coarse anchors": shifted("detector.anchor_generator.fixed_mlp.4.bias"),
    "P4 patches": shifted("detector.anchor_generator.compress.P4.2.bias"),
    "P4 anchors": shifted("detector.anchor_generator.norm.P4.bias"),
    "P3 patches": shifted("detector.anchor_generator.compress.P3.2.bias"),
    "P3 anchors": shifted("detector.anchor_generator.norm.P3.bias"),
    "anchors": fewer_anchors,
    "proposals": shifted("detector.proposals.roi_norm.bias"),
    "head": shifted("detector.heads.main.feed_forward.norm.bias"),
    "detections": swapped_categories,
}


def test_every_stage_can_be_seen_and_agrees(models: Models) -> None:
    report = models.compare()
    assert [stage.stage for stage in report.stages] == models.stages == list(BREAKS)
    assert report.first is None, stage_text(report)
    assert all(stage.unmatched == 0 for stage in report.stages)
    assert "within its tolerance" in report.sentence()
    assert "broken" not in stage_text(report)


def test_the_values_are_those_of_pytorch(models: Models) -> None:
    tensors = {
        "images": np.stack([random_picture(5, 160, 192)] * 2).transpose(0, 3, 1, 2),
        "sizes": np.array([[160, 192], [96, 128]], np.float32),
    }
    ours, theirs = models.reference.stage_values(tensors), OnnxStages(models.path, 1).run(tensors)
    assert set(ours) - set(theirs) == {"proposals/boxes", "proposals/logits"}, "what only pictures show"
    assert set(theirs) <= set(ours)
    for name, value in theirs.items():
        assert value.shape == ours[name].shape, name


@pytest.mark.parametrize("stage", BREAKS)
def test_a_planted_break_is_found_where_it_was_planted(models: Models, tmp_path: Path, stage: str) -> None:
    report = models.compare(models.broken(tmp_path / "broken.onnx", BREAKS[stage]))
    assert report.first is not None
    assert report.first.stage == stage, stage_text(report)
    assert len(report.first.images_over) == IMAGES
    assert f"start at {stage}" in report.sentence()
    values = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert values["first"] == stage


def test_numbers_that_are_none_are_a_difference(models: Models, tmp_path: Path) -> None:
    path = models.broken(tmp_path / "broken.onnx", shifted("detector.proposals.roi_norm.weight", np.nan))
    report = models.compare(path)
    assert report.first is not None
    assert report.first.stage == "proposals"
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"decoder": "sparse_rcnn"}, {"levels": "P5P6"}])
def test_other_models_show_their_stages(tmp_path: Path, changes: dict[str, str]) -> None:
    models = Models(tmp_path, **changes)
    report = models.compare()
    assert report.first is None, stage_text(report)
    expected = [stage for stage in BREAKS if changes.get("levels") != "P5P6" or stage[:2] not in ("P4", "P3")]
    assert [stage.stage for stage in report.stages] == models.stages == expected
    for stage in ("proposals", "head"):
        broken = models.compare(models.broken(tmp_path / f"{stage}.onnx", sound_edit(models.path, stage)))
        assert broken.first is not None
        assert broken.first.stage == stage


def sound_edit(path: Path, stage: str) -> Edit:
    """A break of a stage by a bias that every kind of head has."""
    prefix = {"proposals": "detector.proposals.roi_norm.bias", "head": "detector.heads.main.branches.box_deltas.bias"}
    return shifted(prefix[stage])


def test_files_that_name_their_stages_and_pytorch_show_them(models: Models, toy_onnx: Path) -> None:
    candidate, toy = OnnxRuntimeSession(models.path, threads=1), OnnxRuntimeSession(toy_onnx, threads=1)
    assert can_compare(models.reference, candidate)
    assert can_compare(candidate, models.reference)
    assert not can_compare(models.reference, toy)
    assert not can_compare(toy, candidate)
    with pytest.raises(ValueError, match=r"toy\.onnx names no stages"):
        OnnxStages(toy_onnx)


def stage_text(report: StageReport) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(stage_table(report))
    return console.file.getvalue()  # type: ignore[attr-defined]
