"""`asag parity`: budgets, batches and stages end in an exit code and a file."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import helper

from asag.cli.parity import parity
from asag.runtime.files import write_json
from asag.runtime.reports.page import find_reports
from tests.builders import CATEGORY_IDS, CATEGORY_NAMES, random_picture
from tests.exports import small_export


class Files:
    """A checkpoint, its export, one with other scores, and a dataset of three pictures."""

    def __init__(self, folder: Path) -> None:
        from PIL import Image

        exported = small_export()
        self.checkpoint = exported.checkpoint(folder / "small.safetensors")
        self.model = exported.write(folder / "small.onnx")
        self.worse = folder / "worse.onnx"
        onnx.save(_with_smaller_scores(onnx.load(self.model)), self.worse)
        self.data = folder / "data"
        (self.data / "val2017").mkdir(parents=True)
        records = []
        for number in (1, 2, 3):
            Image.fromarray(random_picture(number, 120, 150)).save(self.data / "val2017" / f"{number}.png")
            records.append({"id": number, "file_name": f"{number}.png", "height": 120, "width": 150})
        boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [10, 10, 50, 40]} for n in (1, 2, 3)]
        categories = [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, CATEGORY_NAMES, strict=True)]
        content = {"images": records, "annotations": boxes, "categories": categories}
        write_json(self.data / "annotations" / "instances_val2017.json", content)

    def parity(self, candidate: Path, *options: str | Path) -> Result:
        arguments = [self.checkpoint, candidate, "--data", self.data, "--threads", "1", *options]
        return CliRunner().invoke(parity, list(map(str, arguments)))


def _with_smaller_scores(model: onnx.ModelProto) -> onnx.ModelProto:
    """The detections of a model with 0.9 of their scores."""
    (node,) = [node for node in model.graph.node if "scores" in node.output]
    node.output[list(node.output).index("scores")] = "whole_scores"
    model.graph.initializer.append(helper.make_tensor("part", onnx.TensorProto.FLOAT, [], [0.9]))
    model.graph.node.append(helper.make_node("Mul", ["whole_scores", "part"], ["scores"]))
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("parity"))


def test_an_export_is_within_every_budget(files: Files, tmp_path: Path) -> None:
    budgets = ["--max-ap-drop", "0.0005", "--max-score-difference", "1e-4", "--max-box-difference", "0.05"]
    more = ["--max-unmatched", "0", "--min-agreement", "0.999"]
    done = files.parity(files.model, "--check", *budgets, *more, "--json", tmp_path / "parity.json")
    assert done.exit_code == 0, done.output
    assert "every stage is within its tolerance" in " ".join(done.output.split())
    assert "batches of 2, 4 give the results of batch 1" in done.output
    (document,), _ = find_reports([tmp_path])
    assert [len(group.pictures) for group in document.pictures] == [3, 3, 3]
    assert [len(group.pictures) for group in document.stage_pictures] == [5, 5, 5]
    assert document.start_pictures == ()


def test_a_budget_fails_and_the_stage_is_named(files: Files, tmp_path: Path) -> None:
    done = files.parity(files.worse, "--max-score-difference", "0.01", "--json", tmp_path / "parity.json")
    assert done.exit_code == 1
    output = " ".join(done.output.split())
    assert "over budget: worse.onnx (onnxruntime-cpu fp32): largest score difference" in output
    assert "differences start at detections on 3 of 3 images" in output
    content = json.loads((tmp_path / "parity.json").read_text())
    assert content["stages"][0]["first"] == "detections"
    (document,), _ = find_reports([tmp_path])
    (start,) = document.start_pictures
    shown = [picture.caption.partition(": ")[2].partition(":")[0] for picture in start.pictures]
    assert shown == ["P4 patches", "anchors", "head", "detections"] * 2, "what both show, side by side"
    assert "starts to differ at detections" in start.title


def test_without_budgets_a_difference_is_only_told(files: Files) -> None:
    done = files.parity(files.worse, "--no-batch-check", "--no-stages")
    assert done.exit_code == 0
    assert "batch" not in done.output
    assert "Stages of" not in done.output
    assert files.parity(files.worse, "--no-batch-check", "--no-stages", "--check").exit_code == 1
