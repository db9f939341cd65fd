"""`asag quantize`: from an exported file and images to an int8 file, its budget, and its one-line errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from asag.export.conversion import convert_file
from asag.train.synthetic import write_synthetic_dataset

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Workspace

DEMO_WEIGHTS = Path(__file__).parents[2] / "checkpoints" / "asag-a-tiny.safetensors"


def test_the_way_of_a_file(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    output, folder = tmp_path / "int8.onnx", workspace.data / "val2017"
    done = asag("quantize", workspace.model, "-o", output, "--calibration", folder, "--calibration-images", "3")
    assert (done.code, done.error) == (0, "")
    assert "20 of 20 convolutions of backbone and neck in int8, calibrated on 3 images" in done.output
    assert "unknown until `asag parity`" in done.output
    assert "calibrating" in done.output
    compared = asag("parity", workspace.checkpoint, output, "--data", workspace.data, "--no-batch-check")
    assert (compared.code, compared.error) == (0, "")
    assert "int8" in compared.output
    again = asag("quantize", output, "-o", tmp_path / "twice.onnx", "--calibration", folder)
    assert again.code == 2
    assert "int8.onnx: it is int8 already" in again.error
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]


def test_measured_without_a_budget(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    done = asag(
        *("quantize", workspace.model, "-o", tmp_path / "int8.onnx", "--calibration", workspace.data / "val2017"),
        *("--data", workspace.data, "--images", "2"),
    )
    assert (done.code, done.error) == (0, "")
    assert "AP on 2 images: " in done.output
    assert "may fall" not in done.output


def plant_outliers(source: Path, output: Path, layer: str, reader: str, factor: float) -> None:
    """Multiply the first channel that `layer` gives and divide the weights that read it: the same function, but one
    channel of `reader`'s input is far larger than all others.
    """
    proto = onnx.load(source)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    changes = ((f"{layer}.weight", 0, factor), (f"{layer}.bias", 0, factor), (f"{reader}.weight", 1, 1 / factor))
    for name, axis, multiplier in changes:
        tensor = tensors[f"detector.{name}"]
        values = numpy_helper.to_array(tensor).copy()
        np.moveaxis(values, axis, 0)[0] *= multiplier
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, output)


@pytest.mark.slow
def test_a_layer_that_breaks_the_budget_is_named_and_taken_back(asag: Command, tmp_path: Path) -> None:
    data = write_synthetic_dataset(tmp_path / "data", train_images=2, val_images=4, image_size=320, seed=3)
    exported, planted, output = (tmp_path / name for name in ("model.onnx", "planted.onnx", "int8.onnx"))
    assert asag("export", DEMO_WEIGHTS, "-o", exported).code == 0
    plant_outliers(exported, planted, "backbone.layer3.0.conv1", "backbone.layer3.0.conv2", 1000)
    command = ("quantize", planted, "-o", output, "--calibration", data / "val2017", "--data", data)
    done = asag(*command, "--max-ap-drop", "0.05")
    assert (done.code, done.error) == (0, "")
    assert "19 of 20 convolutions of backbone and neck in int8" in done.output
    named = [line.strip() for line in done.output.splitlines() if line.startswith("  ")]
    assert [line.partition(":")[0] for line in named] == ["backbone.layer3.0.conv2"]
    assert float(named[0].partition(": ")[2]) > 0.01
    options = ("--data", data, "--no-batch-check", "--no-stages", "--max-ap-drop", "0.05")
    assert asag("parity", exported, output, *options).code == 0
    whole = tmp_path / "whole.onnx"
    assert asag("quantize", planted, "-o", whole, "--calibration", data / "val2017").code == 0
    assert asag("parity", exported, whole, *options).code == 1


CASES = [
    ("{model} --calibration {empty} -o {out}.onnx", "no images in the folder {empty}"),
    ("{model} --calibration {bad}/nowhere -o {out}.onnx", "{bad}/nowhere is not a folder"),
    ("{model} --calibration {images} -o {out}.engine", "should end in .onnx"),
    ("{model} -o {out}.onnx", "Missing option '--calibration'"),
    ("{bad}/no.onnx --calibration {images} -o {out}.onnx", "model not found: {bad}/no.onnx"),
    ("{bad}/damaged.onnx --calibration {images} -o {out}.onnx", "cannot read {bad}/damaged.onnx as ONNX"),
    ("{model} --calibration {broken} -o {out}.onnx", "{broken}/a.jpg is not an image"),
    ("{model} --calibration {images} -o {out}.onnx --max-ap-drop 0.01", "--max-ap-drop needs --data"),
    ("{model} --calibration {images} -o {out}.onnx --max-ap-drop 2", "2.0 is not in the range"),
    ("{model} --calibration {images} -o {out}.onnx --data {bad}/nowhere", "dataset not found: {bad}/nowhere"),
    ("{model} --calibration {images} -o {out}.onnx --data {data} --split x", "no split x"),
    ("{half} --calibration {images} -o {out}.onnx", "half.onnx: it is fp16 already"),
]


@pytest.fixture(scope="module")
def places(workspace: Workspace, asag: Command, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    bad, half = tmp_path_factory.mktemp("bad"), tmp_path_factory.mktemp("half") / "half.onnx"
    (bad / "damaged.onnx").write_text("nothing of the kind")
    for name in ("empty", "broken"):
        (bad / name).mkdir()
    (bad / "broken" / "a.jpg").write_text("no picture")
    convert_file(workspace.model, half, "fp16")
    return {
        "model": workspace.model,
        "half": half,
        "images": workspace.data / "val2017",
        "data": workspace.data,
        "bad": bad,
        "empty": bad / "empty",
        "broken": bad / "broken",
        "out": bad / "out",
    }


@pytest.mark.parametrize(("line", "expected"), CASES, ids=[line for line, _ in CASES])
def test_one_line(asag: Command, places: dict[str, Path], line: str, expected: str) -> None:
    done = asag("quantize", *(word.format(**places) for word in line.split()))
    assert done.code == 2
    lines = done.error.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("asag: ")
    assert expected.format(**places) in lines[0]
    assert not list(places["bad"].glob("out*")), "nothing is written for bad input"
