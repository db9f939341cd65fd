"""ASAG-D as ONNX files: ops, precision, and the same detections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from asag.runtime import open_session
from asag.runtime.backends.pytorch_session import PyTorchSession
from asag.runtime.parity.agreement import compare_detections
from tests.builders import random_picture
from tests.exports import small_export


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_onnx_runtime_gives_what_pytorch_gives(tmp_path: Path, precision: str, tolerance: float) -> None:
    """Images that fill the input, and smaller ones; queries of equal scores in any order."""
    exported = small_export("deformable")
    pictures = [random_picture(1, 160, 192), random_picture(2, 90, 120)]
    reference = PyTorchSession(exported.deployed, "reference").detect(pictures)
    with open_session(exported.write(tmp_path / "model.onnx", precision)) as session:
        found = session.detect(pictures, batch_size=2)
    for number, (ours, theirs) in enumerate(zip(reference, found, strict=True)):
        assert len(ours) > 20, "the case has few detections"
        np.testing.assert_allclose(theirs.scores, ours.scores, rtol=0, atol=tolerance)
        agreement = compare_detections(number, ours, theirs, 100, suppressed=False)
        assert precision != "fp32" or agreement.within(), agreement
        assert theirs.overflow == ours.overflow


@pytest.mark.slow
def test_maps_begin_at_stride_8_and_places_stay_float(tmp_path: Path) -> None:
    proto = onnx.load(small_export("deformable").write(tmp_path / "half.onnx", "fp16"))
    types = {value.name: value.type.tensor_type.elem_type for value in proto.graph.value_info}
    attended = [node for node in proto.graph.node if node.op_type == "MultiScaleDeformableAttention"]
    assert len(attended) == 3, "two layers of the encoder and the head"
    for node in attended:
        kinds = [types[name] for name in node.input]
        assert kinds == [onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16]
    (aligned,) = (node for node in proto.graph.node if node.op_type == "PyramidRoIAlign")
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in aligned.attribute}
    assert (attributes["maps"], attributes["first_stride"]) == (3, 8)
    assert [types[name] for name in aligned.input][4] == onnx.TensorProto.FLOAT
