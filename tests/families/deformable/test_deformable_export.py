"""The family as ONNX files: ops, stages, precision, and the same detections."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from asag.checkpoint import CheckpointInfo, save_detector
from asag.cli.main import main
from asag.deploy import DeployedDetector
from asag.export.model import build_onnx
from asag.export.precision import convert_precision
from asag.families.deformable import DEFORMABLE
from asag.families.deformable.detector import levels_of
from asag.families.deformable.proposals import proposal_boxes
from asag.family import InputSpec
from asag.parts.backbones.swin import DEPTHS
from asag.runtime import open_session
from asag.runtime.metadata import ModelMetadata
from asag.runtime.onnx_file import write_metadata
from tests.builders import random_picture, uint8_batch
from tests.families.deformable.small_detector import PLAIN, SPARSE, random_detector, small_config, small_info

SIZE = (128, 160)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse detector on a short Swin as `float.onnx` and `half.onnx`, and as it is exported: `model.pt`."""
    folder = tmp_path_factory.mktemp("exported")
    size = dataclasses.replace(small_config().size, backbone_width=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DEPTHS, "swin-t", (1, 2, 1, 1))
        detector = random_detector(small_config(backbone="swin-t", size=size))
    model = DeployedDetector(detector, small_info(input_size=SIZE))
    proto, metadata = build_onnx(model.eval()), ModelMetadata(**model.describe())
    for name, precision in (("float", "fp32"), ("half", "fp16")):
        converted = convert_precision(proto, precision, metadata)
        write_metadata(converted, ModelMetadata(**{**model.describe(), "precision": precision}))
        onnx.checker.check_model(converted)
        onnx.save(converted, folder / f"{name}.onnx")
    torch.save(model, folder / "model.pt")
    return folder


def test_an_input_with_fewer_tokens_than_queries_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_detector(tmp_path / "few.safetensors", random_detector(small_config(queries=40)), small_info())
    with pytest.raises(SystemExit) as stopped:
        main(["export", f"{tmp_path}/few.safetensors", "-o", f"{tmp_path}/few.onnx", "--input-size", "32x32"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "asag: an input of 22 cells has no room for 40 queries\n"


def test_ops_and_stages_are_in_the_file(exported: Path) -> None:
    proto = onnx.load(exported / "float.onnx")
    operators = [node.op_type for node in proto.graph.node if node.domain == "asag"]
    assert operators == ["SelectTokens", *["MultiScaleDeformableAttention"] * 5]
    assert not {"TopK", "GridSample"} & {node.op_type for function in proto.functions for node in function.node}
    made = {name for node in proto.graph.node for name in node.output}
    model = torch.load(exported / "model.pt", weights_only=False)
    for stage in DEFORMABLE.stages(model.detector.config):
        assert set(stage.value_names()) <= made


def test_norms_and_places_stay_float(exported: Path) -> None:
    proto = onnx.load(exported / "half.onnx")
    types = {value.name: value.type.tensor_type.elem_type for value in proto.graph.value_info}
    kept = [node for node in proto.graph.node if node.op_type in ("InstanceNormalization", "LayerNormalization")]
    assert {types[name] for node in kept for name in node.output} == {onnx.TensorProto.FLOAT}
    for node in proto.graph.node:
        if node.op_type == "MultiScaleDeformableAttention":
            assert types[node.input[1]] == onnx.TensorProto.FLOAT


def test_tokens_that_are_not_usable_are_chosen_alike(exported: Path) -> None:
    """Fewer usable tokens than queries: of the others, which are all equal, every backend takes the same."""
    images, sizes = uint8_batch([random_picture(seed, 16, 14 + seed) for seed in range(3)], *SIZE)
    model = torch.load(exported / "model.pt", weights_only=False)
    _, usable = proposal_boxes(levels_of([torch.zeros(3, 1, 16 >> n, 20 >> n) for n in range(4)], sizes, images))
    assert (usable.sum(1) < model.detector.config.queries).all()
    with torch.no_grad():
        boxes, scores, _, _ = (value.numpy() for value in model(images, sizes))
    found = open_session(exported / "float.onnx").run({"images": images.numpy(), "sizes": sizes.numpy()})
    np.testing.assert_allclose(found["scores"], scores, rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.sort(found["boxes"], axis=1), np.sort(boxes, axis=1), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "tolerance"), [("float", 2e-5), ("half", 1e-2)])
def test_onnx_runtime_gives_what_pytorch_gives(exported: Path, name: str, tolerance: float) -> None:
    """Images that fill the input, and ones that need fewer kept tokens than there are places."""
    images, sizes = uint8_batch([random_picture(seed, 128 - 40 * seed, 60 + 50 * seed) for seed in range(3)], *SIZE)
    model = torch.load(exported / "model.pt", weights_only=False)
    with torch.no_grad():
        boxes, scores, labels, overflow = (value.numpy() for value in model(images, sizes))
    found = open_session(exported / f"{name}.onnx").run({"images": images.numpy(), "sizes": sizes.numpy()})
    assert not overflow.any()
    np.testing.assert_allclose(found["scores"], scores, rtol=0, atol=tolerance)
    if name == "float":
        np.testing.assert_array_equal(found["labels"], labels)
        np.testing.assert_allclose(found["boxes"], boxes, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("preset", [PLAIN, SPARSE])
def test_parity_of_all_stages(preset: str, tmp_path: Path) -> None:
    def asag(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert isinstance(ended.value.code, int)
        return ended.value.code

    data, checkpoint, file = (tmp_path / name for name in ("data", "small.safetensors", "small.onnx"))
    options = ["--train-images", 1, "--val-images", 3, "--image-size", 160]
    assert asag("data", "synthetic", data, *options) == 0
    annotations = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    names = {each["id"]: each["name"] for each in annotations["categories"]}
    info = CheckpointInfo(preset, tuple(names), tuple(names.values()), InputSpec(160, 160, (160, 160)))
    save_detector(checkpoint, random_detector(small_config(preset, num_classes=len(names))), info)
    assert asag("export", checkpoint, "-o", file) == 0
    report = ["--json", tmp_path / "parity.json", "--stages", "--check"]
    assert asag("parity", checkpoint, file, "--data", data, *report) == 0
    (stages,) = json.loads((tmp_path / "parity.json").read_text())["stages"]
    selection, start = (["token scores", "kept tokens"], "proposals") if preset == SPARSE else ([], "start")
    decoder = ["decoder 0", "decoder 1", "decoder 2"]
    expected = ["features", *selection, "encoder", start, *decoder, "head", "detections"]
    assert [stage["stage"] for stage in stages["stages"]] == expected
    assert stages["first"] is None
    pictures = tmp_path / "pictures"
    assert asag("detect", data / "val2017", "--model", file, "--stages", "-o", pictures) == 0
    assert len(list(pictures.glob("*-stages.jpg"))) == 3
