"""The exported file: what is in it, and that ONNX Runtime gets PyTorch's numbers from it."""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.torch_version import TorchVersion

import asag.export.model
from asag.checkpoint import load_detector
from asag.deploy import DeployedDetector
from asag.detector import Detector
from asag.export.model import ExportReport, export_onnx
from asag.export.op_bodies.domain import DOMAIN_VERSION
from asag.families import find_preset
from asag.runtime.metadata import ModelMetadata
from asag.runtime.opening import open_session
from asag.runtime.parity.agreement import compare_detections
from asag.runtime.postprocessing import OUTPUT_NAMES, postprocess
from asag.trt_plugins.operations import DOMAIN
from tests.builders import (
    normalized_batch,
    random_detector,
    random_picture,
    small_config,
    small_info,
    uint8_batch,
    write_checkpoint,
)

HEIGHT, WIDTH = 192, 256

MOST_NODES = 582 + (20 if TorchVersion(torch.__version__) < "2.14" else 0)
"""What was measured; the exporter of an older PyTorch leaves some that a newer one simplifies away."""


@pytest.fixture(scope="module")
def deployed() -> DeployedDetector:
    """The demo's preset with random weights, at a smaller input that explores more places than P3 has room for."""
    config = dataclasses.replace(find_preset("asag-a-tiny").config, num_classes=3, patch_capacity=(3, 2))
    return DeployedDetector(random_detector(config), small_info((HEIGHT, WIDTH)))


@pytest.fixture(scope="module")
def report(deployed: DeployedDetector, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export_onnx(deployed, tmp_path_factory.mktemp("export") / "model.onnx")


@pytest.fixture(scope="module")
def proto(report: ExportReport) -> onnx.ModelProto:
    return onnx.load(report.path)


def test_the_checker_passes(report: ExportReport, proto: onnx.ModelProto) -> None:
    onnx.checker.check_model(str(report.path), full_check=False)
    assert {entry.domain: entry.version for entry in proto.opset_import}[DOMAIN] == DOMAIN_VERSION


def test_the_ops_are_nodes_with_bodies(report: ExportReport, proto: onnx.ModelProto) -> None:
    nodes = Counter(node.op_type for node in proto.graph.node if node.domain == DOMAIN)
    assert nodes == {"AdaptiveProbing": 2, "GatherAnchors": 1, "PyramidRoIAlign": 1, "SamplingMixing": 1}
    assert nodes == report.operations
    bodies = {function.name for function in proto.functions}
    assert set(nodes) <= bodies
    domains = {node.domain for node in proto.graph.node}
    assert domains <= {"", DOMAIN}
    used = {node.op_type for function in proto.functions for node in function.node if node.domain == DOMAIN}
    assert used <= bodies
    assert report.nodes == len(proto.graph.node)


def test_the_stages_names_cost_no_node(deployed: DeployedDetector, proto: onnx.ModelProto) -> None:
    assert "Stage" not in {node.op_type for node in proto.graph.node}
    assert len(proto.graph.node) <= MOST_NODES
    made = {output for node in proto.graph.node for output in node.output}
    assert made >= {name for stage in deployed.stages for name in stage.value_names()}


def test_attributes_are_those_of_the_preset(deployed: DeployedDetector, proto: onnx.ModelProto) -> None:
    found = {}
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert values.pop("plugin_namespace") == b"asag"  # where TensorRT's parser looks for a plugin
            found.setdefault(node.op_type, []).append(values)
    p4, p3 = deployed.detector.config.patch_capacity
    assert found["AdaptiveProbing"] == [{"stride": 16, "capacity": p4}, {"stride": 8, "capacity": p3}]
    budget = deployed.detector.config.budget
    gather = found["GatherAnchors"][0]
    assert gather.pop("keep_threshold") == pytest.approx(budget.keep_threshold)
    assert gather == {"first": 5 * budget.fixed_anchors, "fewest": budget.fewest, "most": budget.most}
    assert found["PyramidRoIAlign"] == [{"maps": 4, "first_stride": 4}]
    mixed_points = deployed.detector.config.size.mixed_points
    assert found["SamplingMixing"] == [{"mixed_points": mixed_points, "activation": 0, "point_unit": 4}]


def dimensions(value: onnx.ValueInfoProto) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def test_inputs_and_outputs(proto: onnx.ModelProto) -> None:
    """Batch is the only dynamic axis, and the same one everywhere."""
    shapes = {value.name: dimensions(value) for value in (*proto.graph.input, *proto.graph.output)}
    batch = shapes["images"][0]
    assert isinstance(batch, str)
    assert shapes == {
        "images": [batch, 3, HEIGHT, WIDTH],
        "sizes": [batch, 2],
        "boxes": [batch, 100, 4],
        "scores": [batch, 100],
        "labels": [batch, 100],
        "overflow": [batch],
    }
    types = {value.name: value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)}
    assert types["images"] == onnx.TensorProto.UINT8
    assert types["sizes"] == types["boxes"] == types["scores"] == onnx.TensorProto.FLOAT
    assert types["labels"] == onnx.TensorProto.INT64
    assert types["overflow"] == onnx.TensorProto.INT32


def test_no_shape_depends_on_the_data(proto: onnx.ModelProto) -> None:
    operators = {node.op_type for node in proto.graph.node}
    assert not operators & {"NonZero", "NonMaxSuppression", "Compress", "Unique", "If", "Loop", "Scan", "RoiAlign"}
    unknown = [
        value.name
        for value in proto.graph.value_info
        for axis in dimensions(value)[1:]
        if isinstance(axis, str) and axis.startswith("unk")
    ]
    assert not unknown


def test_metadata(deployed: DeployedDetector, report: ExportReport, proto: onnx.ModelProto) -> None:
    metadata = ModelMetadata.from_properties({entry.key: entry.value for entry in proto.metadata_props})
    assert metadata == report.metadata == ModelMetadata(**deployed.describe())
    assert metadata.weights_digest == deployed.digest
    assert {entry.key.partition(".")[0] for entry in proto.metadata_props} == {"asag"}


def test_the_report_counts(deployed: DeployedDetector, report: ExportReport) -> None:
    kept = sum(parameter.numel() for parameter in deployed.parameters())
    assert report.bytes == report.path.stat().st_size
    assert report.bytes > 4 * kept
    trained = sum(parameter.numel() for parameter in random_detector(deployed.detector.config).parameters())
    assert report.parameters_left_out == trained - kept > 0


def test_nothing_names_the_exporting_machine(report: ExportReport) -> None:
    content = report.path.read_bytes()
    folders = (
        Path.home(),
        Path.cwd(),
        sys.prefix,
        tempfile.gettempdir(),
        Path(torch.__file__).parent,
        Path(__file__).parents[2],
    )
    for text in (*sorted({str(folder) for folder in folders} - {"/"}), "site-packages", ".py", "Traceback"):
        assert text.encode() not in content, text


def runtime_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def session(report: ExportReport) -> onnxruntime.InferenceSession:
    return runtime_session(report.path)


CONTENTS = {
    "whole": [(HEIGHT, WIDTH)],
    "part": [(97, 131)],
    "one-row": [(1, WIDTH)],
    "one-pixel": [(1, 1)],
    "two": [(HEIGHT, WIDTH), (40, 180)],
    "three": [(90, 100), (HEIGHT, 33), (HEIGHT, WIDTH)],
}


@pytest.mark.parametrize("contents", CONTENTS.values(), ids=CONTENTS)
def test_onnxruntime_equals_pytorch(
    deployed: DeployedDetector, session: onnxruntime.InferenceSession, contents: list[tuple[int, int]]
) -> None:
    """Scores within 1e-4 and boxes within 0.05 pixels, image by image, from the same file for every batch size."""
    images, sizes = uint8_batch([random_picture(20 + i, *size) for i, size in enumerate(contents)], HEIGHT, WIDTH)
    with torch.no_grad():
        expected = dict(zip(OUTPUT_NAMES, (value.numpy() for value in deployed(images, sizes)), strict=True))
    found = session.run(list(OUTPUT_NAMES), {"images": images.numpy(), "sizes": sizes.numpy()})
    found = dict(zip(OUTPUT_NAMES, found, strict=True))
    assert {name: (value.dtype, value.shape) for name, value in found.items()} == {
        name: (value.dtype, value.shape) for name, value in expected.items()
    }
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found["overflow"], expected["overflow"])
    metadata = ModelMetadata(**deployed.describe())
    pairs = zip(postprocess(expected, contents, metadata), postprocess(found, contents, metadata), strict=True)
    for index, (reference, ours) in enumerate(pairs):
        assert len(ours) > 0
        assert compare_detections(index, reference, ours, metadata.max_detections).within(), contents[index]


def test_the_contents_fill_the_capacity_and_do_not(session: onnxruntime.InferenceSession) -> None:
    """So that the comparison above sees both: candidates left out by P3's two places, and places left empty."""
    images, sizes = uint8_batch([random_picture(20, HEIGHT, WIDTH), random_picture(21, 1, 1)], HEIGHT, WIDTH)
    overflow = session.run(["overflow"], {"images": images.numpy(), "sizes": sizes.numpy()})[0]
    assert overflow[0] > 0
    assert overflow[1] == 0


@pytest.mark.slow
def test_the_other_head_with_float32_input(tmp_path: Path) -> None:
    """The Sparse R-CNN head takes RoI features a second time and mixes no samples."""
    deployed = DeployedDetector(
        random_detector(small_config(decoder="sparse_rcnn")), small_info((96, 96)), input_type="float32"
    )
    report = export_onnx(deployed, tmp_path / "variant.onnx")
    assert report.operations == {"AdaptiveProbing": 2, "GatherAnchors": 1, "PyramidRoIAlign": 2}
    assert "SamplingMixing" not in {function.name for function in onnx.load(report.path).functions}
    images, sizes = normalized_batch([random_picture(50, 96, 96), random_picture(51, 60, 80)], 96, 96)
    with torch.no_grad():
        expected = deployed(images, sizes)
    found = runtime_session(report.path).run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
    np.testing.assert_allclose(found[1], expected[1].numpy(), rtol=0, atol=1e-4)
    assert found[1].max() > 0


def test_sessions_of_checkpoint_and_file_agree(
    tmp_path: Path, report: ExportReport, deployed: DeployedDetector
) -> None:
    """The whole way with the runtime's pre- and post-processing, from a checkpoint that was written and read."""
    detector: Detector = random_detector(deployed.detector.config)
    checkpoint = write_checkpoint(tmp_path / "model.safetensors", detector, deployed.info)
    assert load_detector(checkpoint)[0].config == deployed.detector.config
    pictures = [random_picture(40 + i, *size) for i, size in enumerate([(200, 240), (50, 300), (333, 100)])]
    with open_session(checkpoint) as reference, open_session(report.path, threads=1) as candidate:
        assert candidate.metadata == reference.metadata
        results = zip(reference.detect(pictures), candidate.detect(pictures, batch_size=2), strict=True)
        for index, (one, other) in enumerate(results):
            assert compare_detections(index, one, other, 100).within()


def without_metadata(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy as the exporter makes it, before the metadata are added."""
    built = onnx.ModelProto()
    built.CopyFrom(proto)
    del built.metadata_props[:]
    return built


def test_a_refused_model_leaves_the_old_file(
    deployed: DeployedDetector, proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")
    broken = without_metadata(proto)
    broken.graph.node[0].op_type = "NoSuchOperator"
    monkeypatch.setattr(asag.export.model, "build_onnx", lambda model: broken)
    with pytest.raises(ValueError, match="NoSuchOperator") as caught:
        export_onnx(deployed, path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_is_made_and_nothing_else(
    deployed: DeployedDetector, proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asag.export.model, "build_onnx", lambda model: without_metadata(proto))
    written = export_onnx(deployed, tmp_path / "new" / "model.onnx").path
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.onnx"]
    assert onnx.load(written) == proto


def test_writing_replaces_the_file_in_one_step(
    deployed: DeployedDetector, proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has the old file open keeps reading the old one: it is replaced, not written into."""
    path, old = tmp_path / "model.onnx", tmp_path / "old.onnx"
    path.write_bytes(b"the old one")
    old.hardlink_to(path)
    monkeypatch.setattr(asag.export.model, "build_onnx", lambda model: without_metadata(proto))
    export_onnx(deployed, path)
    assert old.read_bytes() == b"the old one"
    assert onnx.load(path) == proto


@pytest.mark.parametrize("bad", [0.0, -5.0, math.nan, math.inf, 1e9, 0.3])
def test_sizes_that_cannot_be_reach_no_neighbour(
    session: onnxruntime.InferenceSession, deployed: DeployedDetector, bad: float
) -> None:
    images, sizes = uint8_batch([random_picture(22, HEIGHT, WIDTH), random_picture(23, 150, 190)], HEIGHT, WIDTH)
    alone = session.run(list(OUTPUT_NAMES), {"images": images[:1].numpy(), "sizes": sizes[:1].numpy()})
    sizes[1] = bad
    outputs = session.run(list(OUTPUT_NAMES), {"images": images.numpy(), "sizes": sizes.numpy()})
    for name, found, expected in zip(OUTPUT_NAMES, outputs, alone, strict=True):
        assert np.isfinite(found).all(), name
        np.testing.assert_allclose(found[:1], expected, atol=1e-5, err_msg=name)
    with torch.no_grad():
        scores = deployed(images, sizes)[1]
    np.testing.assert_allclose(outputs[1], scores.numpy(), atol=1e-4)
