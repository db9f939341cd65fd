from __future__ import annotations

import pytest

from asag.runtime.engines.layers import BuildMessages, EngineLayers, summarize
from asag.runtime.records import convert, to_json

LISTED = """Layers:
Name: node_conv2d_myl0_17, LayerType: correlation, Inputs: [ { Name: a, Dimensions: [1,3], Datatype: Float }], \
Constants: [ { Name: w, Datatype: Half }], Outputs: [ { Name: b, Dimensions: [1,32], Datatype: Half, Format: NHWC }], \
TacticName: , StreamId: 0, Metadata: [ONNX Layer: node_conv2d][ONNX Layer: node_relu]
Name: node_conv2d [profile 1]_myl1_17, LayerType: correlation, Inputs: [], Constants: [], Outputs: [ { Name: b, \
Dimensions: [-1,32], Datatype: Half }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: node_conv2d]\
[ONNX Layer: node_relu]
Name: wait_1, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata:
Name: __myl_Topk_myl0_201, LayerType: kgen, Inputs: [], Constants: [], Outputs: [ { Name: v, Datatype: Float }, \
{ Name: i, Datatype: Int32 }], TacticName: x, StreamId: 0, Metadata: [ONNX Layer: node_topk]
Bindings:
Name: images, IOMode: Input, DataType: UInt8, Dimensions: [-1,3,320,320], Location: Device
"""


def test_a_builders_messages() -> None:
    messages = BuildMessages()
    for severity, text in (
        ("info", "Total Activation Memory: 1000 bytes"),
        ("info", "Total Activation Memory: 4000 bytes"),
        ("info", "Total Weights Memory: 77 bytes"),
        ("verbose", LISTED),
        ("info", "Total Host Persistent Memory: 80 bytes"),
    ):
        messages(severity, text)
    layers = messages.engine_layers({"node_conv2d": "Conv", "node_relu": "Relu"})
    assert layers is not None
    assert layers.kernels == {"correlation": 2, "wait": 1, "kgen": 1}
    assert layers.types == {"half": 2, "float": 1}
    assert layers.fused == (("correlation", "Conv + Relu", 1),)
    assert (layers.activation_bytes, layers.weight_bytes) == ((1000, 4000), 77)
    assert convert(to_json(layers), EngineLayers) == layers
    assert messages.lines == []


def test_a_builder_that_lists_no_layers() -> None:
    messages = BuildMessages(keep_all=True)
    messages("warning", "two\n  lines")
    assert messages.engine_layers({}) is None
    assert messages.lines == ["warning: two lines"]


def test_an_inspectors_names_and_objects() -> None:
    layers = summarize(
        ["a", "b + c", "b + c [profile 1]", {"Name": "d + e", "LayerType": "kgen"}, {"Name": "f", "Outputs": [3]}],
        {"c": "C"},
    )
    assert layers.kernels == {"not said": 4, "kgen": 1}
    assert set(layers.fused) == {("not said", "b + C", 1), ("kgen", "d + e", 1)}
    assert layers.types == {}


def test_a_long_fusion_is_counted() -> None:
    (row,) = summarize([" + ".join(f"n{number}" for number in range(20))], {}).fused
    assert row[1].startswith("n0 + n1 + ")
    assert row[1].endswith(" + n7 + 12 more")


GOOD = to_json(EngineLayers({"kgen": 1}, {"half": 1}, (("kgen", "Conv + Relu", 1),), (1000,), 77))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "must be an object"),
        *(({key: GOOD[key] for key in GOOD if key != name}, f"^{name} is missing$") for name in GOOD),
        *((GOOD | {name: [None]}, f"^{name}.* must be ") for name in GOOD),
        (GOOD | {"kernels": {"kgen": -1}}, "must be a whole number >= 0"),
        (GOOD | {"weight_bytes": True}, "must be a whole number$"),
        (GOOD | {"fused": [["kgen", "Conv"]]}, r"^fused\[0\] must be a list of length 3$"),
    ],
)
def test_damaged(values: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(values, EngineLayers)
