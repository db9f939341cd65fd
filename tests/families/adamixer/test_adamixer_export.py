"""AdaMixer as an ONNX file: ops, stages, precision, and the same detections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from asag.deploy import DeployedDetector
from asag.export.model import build_onnx, export_onnx
from asag.families.adamixer import ADAMIXER
from asag.families.adamixer.detector import AdaMixerDetector
from asag.runtime import open_session
from asag.runtime.stages.draw import stage_panels
from tests.builders import random_picture, uint8_batch
from tests.families.adamixer.small_detector import random_detector, small_config, small_info


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    model = DeployedDetector(random_detector(), small_info())
    export_onnx(model, folder / "float.onnx")
    export_onnx(model, folder / "half.onnx", "fp16")
    return folder


def test_ops_say_their_activation_and_unit(exported: Path) -> None:
    proto = onnx.load(exported / "float.onnx")
    nodes = [node for node in proto.graph.node if node.domain == "asag"]
    assert [node.op_type for node in nodes] == ["SamplingMixing"] * 3
    for node in nodes:
        values = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        assert (values["activation"], values["point_unit"]) == (1, 1)
    (body,) = [function for function in proto.functions if function.name == "SamplingMixing"]
    operators = {node.op_type for node in body.node}
    assert "Relu" in operators
    assert "Gelu" not in operators


def test_every_stage_has_its_values_in_the_file(exported: Path) -> None:
    made = {name for node in onnx.load(exported / "float.onnx").graph.node for name in node.output}
    for stage in ADAMIXER.stages(small_config()):
        assert set(stage.value_names()) <= made


def test_every_stage_is_drawn_with_the_points_of_the_best(exported: Path) -> None:
    picture = random_picture(1, 160, 192)
    with open_session(exported / "float.onnx") as session:
        panels = stage_panels(Image.fromarray(picture), session.stages(picture), 0.01)
    looking = [f"decoder {number}: 12; where the best 4 look, in a colour each" for number in range(3)]
    assert [panel.caption for panel in panels[:-1]] == ["start: 12", *looking]


def test_the_norm_of_the_neck_stays_float(exported: Path) -> None:
    proto = onnx.load(exported / "half.onnx")
    types = {value.name: value.type.tensor_type.elem_type for value in proto.graph.value_info}
    means = [node for node in proto.graph.node if node.op_type == "ReduceMean"]
    assert len(means) == 4 * 4
    normed = {name for node in means for name in node.output} | {f"features/p{level}" for level in (2, 3, 4, 5)}
    assert {types[name] for name in normed} == {onnx.TensorProto.FLOAT}
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert {types[name] for node in convolutions for name in node.output} == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize(("name", "tolerance"), [("float", 1e-5), ("half", 1e-2)])
def test_onnx_runtime_gives_what_pytorch_gives(exported: Path, name: str, tolerance: float) -> None:
    images, sizes = uint8_batch([random_picture(seed, 100 + 20 * seed, 150) for seed in range(3)], 160, 192)
    model = DeployedDetector(random_detector(), small_info())
    with torch.no_grad():
        boxes, scores, labels, overflow = (value.numpy() for value in model(images, sizes))
    session = open_session(exported / f"{name}.onnx")
    found = session.run({"images": images.numpy(), "sizes": sizes.numpy()})
    assert not overflow.any()
    np.testing.assert_allclose(found["scores"], scores, rtol=0, atol=tolerance)
    if name == "float":
        np.testing.assert_array_equal(found["labels"], labels)
        np.testing.assert_allclose(found["boxes"], boxes, rtol=1e-4, atol=1e-4)  # they may reach past the image


@pytest.mark.slow
def test_a_forward_pass_that_fixes_the_number_of_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    start = AdaMixerDetector.start

    def fixed(self: AdaMixerDetector, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        queries, xyzr = start(self, sizes)
        return queries[: len(sizes)], xyzr

    monkeypatch.setattr(AdaMixerDetector, "start", fixed)
    with pytest.raises(ValueError, match="the forward pass fixes the number of images"):
        build_onnx(DeployedDetector(random_detector(), small_info()))
