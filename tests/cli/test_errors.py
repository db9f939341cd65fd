"""Bad input of every command: one clear line on standard error, exit code 2, no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
import torch

from asag.cli import main as main_module
from asag.cli.main import main
from asag.runtime.errors import BackendUnavailableError

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Workspace


@pytest.fixture(scope="module")
def places(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the lines of the table below name in braces."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("damaged.onnx", "damaged.safetensors", "damaged.engine", "text.txt"):
        (folder / name).write_text("nothing of the kind")
    (folder / "empty").mkdir()
    return {
        "bad": folder,
        "data": workspace.data,
        "image": workspace.images[0],
        "onnx": workspace.model,
        "checkpoint": workspace.checkpoint,
        "other": workspace.other_classes,
        "out": folder / "out",
    }


DETECT = "detect {image} -o {out} --model"
CASES = [
    ("fly", "No such command 'fly'; see `asag --help`"),
    ("zoo fly", "No such command 'fly'; see `asag zoo --help`"),
    ("detect", "Missing argument 'IMAGES...'; see `asag detect --help`"),
    ("detect {image}", "Missing option '--model'"),
    (f"{DETECT} {{bad}}/no.onnx", "model not found: {bad}/no.onnx"),
    (f"{DETECT} {{bad}}/no.safetensors", "model not found: {bad}/no.safetensors"),
    (f"{DETECT} {{bad}}/text.txt", "unknown kind of model {bad}/text.txt: expected .onnx, .safetensors, .engine"),
    (f"{DETECT} {{bad}}/damaged.onnx", "cannot open {bad}/damaged.onnx"),
    (f"{DETECT} {{bad}}/damaged.safetensors", "{bad}/damaged.safetensors: not a readable safetensors file"),
    (f"{DETECT} {{bad}}/damaged.engine", "{bad}/damaged.engine"),
    (f"{DETECT} {{onnx}} --device tpu", "unknown device 'tpu'"),
    (f"{DETECT} {{onnx}} --score-threshold 2", "2.0 is not in the range 0<=x<=1"),
    (f"{DETECT} {{onnx}} --batch-size 0", "0 is not in the range"),
    ("detect {image} --model {onnx} -o {bad}/text.txt", "is a file"),
    ("detect {bad}/empty --model {onnx} -o {out}", "no images in the folder {bad}/empty"),
    ("export {bad}/no.safetensors -o {out}.onnx", "{bad}/no.safetensors: no such checkpoint"),
    ("export {bad}/damaged.safetensors -o {out}.onnx", "not a readable safetensors file"),
    ("export {checkpoint} -o {out}.txt", "should end in .onnx"),
    ("zoo convert {bad}/damaged.safetensors -o {out}.pth", "out.pth should end in .safetensors"),
    ("export {checkpoint}", "Missing option '-o' / '--output'"),
    ("export {checkpoint} -o {out}.onnx --input-size 800", "'800' is no size; write HEIGHTxWIDTH"),
    ("export {checkpoint} -o {out}.onnx --input-size 100x128", "height and width must be multiples of 32"),
    ("export {checkpoint} -o {out}.onnx --patch-capacity 3", "patch capacity is 3, which is not of the form P4,P3"),
    ("export {checkpoint} -o {out}.onnx --patch-capacity 3,x", "'3,x' is not of the form P4,P3"),
    ("export {checkpoint} -o {out}.onnx --patch-capacity 3,4,5", "is [3, 4, 5], which is not of the form P4,P3"),
    ("export {checkpoint} -o {out}.onnx --patch-capacity 0,4", "each level needs at least one place"),
    ("export {checkpoint} -o {out}.onnx --head last", "'last' is not one of"),
    ("export {checkpoint} -o {bad}/empty", "is a directory"),
    ("evaluate {onnx} --data {bad}/nowhere", "dataset not found: {bad}/nowhere"),
    ("evaluate {onnx} --data {bad}/empty", "{bad}/empty: looked for annotations/instances_val2017.json"),
    ("evaluate {onnx} --data {data} --split test2017", "no split test2017"),
    ("evaluate {other} --data {data}", "the model's classes are 3: 1 circle, 3 square, 7 star; those of"),
    ("evaluate {onnx} --data {data} --input-size 320x320", "input size fixed"),
    ("parity {checkpoint} --data {data}", "Missing argument 'CANDIDATES...'"),
    ("parity {checkpoint} {bad}/no.onnx --data {data}", "model not found: {bad}/no.onnx"),
    ("parity {checkpoint} {other} --data {data}", "differ in category_ids"),
    ("bench {onnx} --images {bad}/empty", "no images in the folder {bad}/empty"),
    ("bench {onnx} --images {bad}/no.jpg", "{bad}/no.jpg"),
    ("build {bad}/no.onnx -o {out}.engine", "model not found: {bad}/no.onnx"),
    ("build {bad}/damaged.onnx -o {out}.engine", "cannot read {bad}/damaged.onnx as ONNX"),
    ("build {onnx} -o {out}.trt", "suffix .engine"),
    ("build {onnx} -o {out}.engine --batch 4:x", "'4:x' is no list of batch sizes; write them like 1:4:16"),
    ("build {onnx} -o {out}.engine --batch 4:1", "batch sizes must rise"),
    ("train --data {data} -o {out} --preset nothing", "no preset 'nothing'; the presets are asag-a-tiny"),
    ("train --data {bad}/empty -o {out} --preset asag-a-tiny", "looked for annotations/instances_train2017.json"),
    ("train --data {data} -o {out} --set colour=1", "'colour=1': write NAME=VALUE with a NAME of"),
    ("train --data {data} -o {out} --set batch_size", "'batch_size': write NAME=VALUE"),
    ("train --data {data} -o {out} --weights {bad}/no.safetensors", "{bad}/no.safetensors"),
    ("data synthetic {data} --image-size 96", "with other settings"),
    ("data check {bad}/empty", "no data set in {bad}/empty: looked for annotations/instances_SPLIT.json"),
    ("data synthetic {bad}", "holds something else"),
    ("data synthetic {out} --image-size 3", "3 is not in the range"),
    ("demo -o {out} --weights {bad}/no.safetensors", "{bad}/no.safetensors: no such checkpoint"),
]


@pytest.mark.parametrize(("line", "expected"), CASES, ids=[line for line, _ in CASES])
def test_one_line(asag: Command, places: dict[str, Path], line: str, expected: str) -> None:
    if line.startswith(("build", DETECT + " {bad}/damaged.engine")):
        pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    done = asag(*(word.format(**places) for word in line.split()))
    assert done.code == 2
    lines = done.error.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("asag: ")
    assert expected.format(**places) in lines[0]
    assert "Traceback" not in done.output + done.error
    assert not list(places["bad"].glob("out*")), "nothing is written for bad input"


def test_a_file_of_another_model(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    """A valid ONNX file, but not one of ours."""
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(workspace.model)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    done = asag("detect", workspace.images[0], "--model", tmp_path / "foreign.onnx", "-o", tmp_path / "out")
    assert done.code == 2
    assert "foreign.onnx" in done.error
    assert "not an asag model" in done.error
    assert len(done.error.splitlines()) == 1


def test_damaged_annotations(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    for content in ("{", "[]", json.dumps({"images": 3})):
        (tmp_path / "annotations" / "instances_val2017.json").write_text(content)
        done = asag("evaluate", workspace.model, "--data", tmp_path)
        assert done.code == 2
        assert "instances_val2017.json" in done.error
        assert len(done.error.splitlines()) == 1


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `asag zoo` raise."""

    def fail() -> None:
        raise error

    monkeypatch.setitem(main_module.asag.commands, "zoo", click.Command("zoo", callback=fail))


NOT_INSTALLED = "asag: this needs {}, which is not installed: pip install 'asag[{}]'"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("two\n  lines"), 2, "asag: two lines"),
        (FileNotFoundError("x.jpg: not there"), 2, "asag: x.jpg: not there"),
        (BackendUnavailableError("no GPU"), 2, "asag: no GPU"),
        (ModuleNotFoundError("x", name="torch"), 2, NOT_INSTALLED.format("torch", "train")),
        (ModuleNotFoundError("x", name="pycocotools.coco"), 2, NOT_INSTALLED.format("pycocotools", "runtime")),
        (KeyboardInterrupt(), 130, "asag: interrupted"),
    ],
)
def test_how_errors_end(
    asag: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    failing(monkeypatch, error)
    done = asag("zoo")
    assert (done.code, done.error.strip()) == (code, message)


BUGS = (RuntimeError("a bug"), TypeError("a bug"), ModuleNotFoundError("a bug", name="asag.nothing"))


@pytest.mark.parametrize("error", BUGS)
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    failing(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["zoo"])


def test_debugging_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ValueError("bad input"))
    monkeypatch.setenv("ASAG_DEBUG", "1")
    with pytest.raises(ValueError, match="bad input"):
        main(["zoo"])


def test_a_pickle_is_not_executed(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    """A torch file under our suffix is refused by the reader of safetensors."""
    path = tmp_path / "model.safetensors"
    torch.save({"model": {}}, path)
    done = asag("export", path, "-o", tmp_path / "model.onnx")
    assert done.code == 2
    assert "not a readable safetensors file" in done.error
