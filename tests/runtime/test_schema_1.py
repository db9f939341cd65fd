"""Files that were written before families, choices and stages had names still work; those of later versions say so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
from onnx import numpy_helper

from asag.checkpoint import load_detector
from asag.export.conversion import convert_file
from asag.export.exported_file import read_exported
from asag.export.quantized_graph import quantizable_layers
from asag.family import InputSpec
from asag.runtime import open_session
from asag.runtime.engines.manifest import manifest_path, read_manifest
from asag.runtime.files import write_json
from asag.runtime.inspection import inspect_file
from asag.runtime.metadata import ModelMetadata
from asag.runtime.onnx_file import read_onnx
from asag.runtime.parity.agreement import compare_detections
from asag.runtime.parity.comparison import compare, open_candidate, open_reference
from asag.runtime.parity.stage_comparison import can_compare, compare_stages
from asag.runtime.records import read_json
from asag.runtime.reports.document import make_document, read_document
from asag.runtime.session import Session
from asag.runtime.speed.stage_times import measure_stages
from asag.runtime.speed.stage_work import stage_work
from asag.runtime.stages.draw import stage_panels
from tests.builders import random_picture, small_info, write_checkpoint
from tests.exports import SmallExport, small_export
from tests.runtime.engine_stand_in import write_engine
from tests.runtime.toy_detector import ToySession, write_toy_dataset

CHOICES = {"head": "main", "levels": "P3P6", "patch_capacity": [6, 8]}
NAMED_SINCE = ("family", "choices", "stages", "half_layers", "schema")
DEMO_WEIGHTS = Path(__file__).parents[2] / "checkpoints" / "asag-a-tiny.safetensors"


def old_metadata(metadata: ModelMetadata) -> dict[str, Any]:
    """The fields that a file of schema 1 had."""
    values = {field.name: getattr(metadata, field.name) for field in dataclasses.fields(metadata)}
    kept = {name: value for name, value in values.items() if name not in NAMED_SINCE}
    return kept | {"decoder": "adamixer", "backbone": "resnet10", "queries": 50} | CHOICES


def old_properties(metadata: ModelMetadata) -> dict[str, str]:
    return {f"asag.{name}": json.dumps(value) for name, value in old_metadata(metadata).items()}


def old_model(exported: SmallExport, precision: str, path: Path) -> Path:
    """The export as schema 1 wrote it: its values have the exporter's names, and its metadata the old fields."""
    exported.write(path, precision)
    model = onnx.load(path)
    named = dict.fromkeys(name for stage in exported.metadata.stages for name in stage.value_names())
    names = {name: f"value_of_the_exporter_{number}" for number, name in enumerate(named)}
    names |= {f"{name}_half": f"{other}_half" for name, other in names.items()}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in model.graph.value_info:
        value.name = names.get(value.name, value.name)
    del model.metadata_props[:]
    metadata = dataclasses.replace(exported.metadata, precision=precision)
    onnx.helper.set_model_props(model, old_properties(metadata))
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def exported() -> SmallExport:
    return small_export()


@pytest.fixture(scope="module")
def old(exported: SmallExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = old_model(exported, "fp32", tmp_path_factory.mktemp("schema-1") / "old.onnx")
    assert b"features/p2" not in path.read_bytes()
    return path


@pytest.fixture(scope="module")
def checkpoint(exported: SmallExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.checkpoint(tmp_path_factory.mktemp("checkpoint") / "small.safetensors")


@pytest.fixture(scope="module")
def reference(checkpoint: Path, old: Path) -> Session:
    """The checkpoint, deployed as the old file was exported."""
    return open_reference(checkpoint, [open_candidate(old)])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_file_runs_and_its_values_get_their_names(
    exported: SmallExport, reference: Session, precision: str, tmp_path: Path
) -> None:
    path = old_model(exported, precision, tmp_path / "old.onnx")
    proto, metadata = read_onnx(path)
    assert (metadata.family, metadata.schema, metadata.choices) == ("asag", 2, CHOICES)
    assert set(metadata.half_layers) <= set(exported.metadata.half_layers), "decoders that are younger have more"
    assert metadata.half_layers
    made = {output for node in proto.graph.node for output in node.output}
    half = {"features/p2_half"} if precision == "fp16" else set()
    assert {"features/p3", "features/p5", "anchors/boxes", "anchors/valid", *half} <= made
    pictures = [random_picture(1, 150, 190), random_picture(2, 100, 90)]
    with open_session(path, threads=1) as session:
        assert session.metadata == metadata
        differences = [
            abs(ours.scores[0] - theirs.scores[0])
            for ours, theirs in zip(session.detect(pictures), reference.detect(pictures), strict=True)
        ]
        assert max(differences) < (1e-4 if precision == "fp32" else 0.05)
        panels = stage_panels(session_image(), session.stages(session_image()), 0.3)
        assert panels[-1].caption.startswith("detections: ")


def session_image() -> Any:
    from PIL import Image

    return Image.fromarray(random_picture(1, 150, 190))


def test_parity_deploys_the_checkpoint_as_the_file_was_exported(reference: Session, old: Path) -> None:
    assert reference.metadata.choices == CHOICES
    assert reference.metadata.input_size == small_info().input.size
    pictures = [random_picture(1, 150, 190)]
    with open_session(old, threads=1) as candidate:
        ours, theirs = (session.detect(pictures)[0] for session in (reference, candidate))
        assert compare_detections(0, ours, theirs, 100).within()


def test_stage_comparison_finds_what_was_broken(reference: Session, old: Path, tmp_path: Path) -> None:
    dataset = write_toy_dataset(tmp_path / "data", images=2)
    with open_session(old, threads=1) as candidate:
        assert can_compare(reference, candidate)
        whole = compare_stages(reference, candidate, dataset, dataset.image_ids)
    assert [stage.stage for stage in whole.stages] == ["features", "anchors", "detections"]
    assert whole.first is None, whole.sentence()
    model = onnx.load(old)
    (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == "detector.neck.layer_blocks.1.0.bias"]
    values = numpy_helper.to_array(bias) + 0.05 * (1 + np.arange(bias.dims[0], dtype=np.float32) % 3)
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(model, tmp_path / "broken.onnx")
    with open_session(tmp_path / "broken.onnx", threads=1) as candidate:
        broken = compare_stages(reference, candidate, dataset, dataset.image_ids)
    assert broken.first is not None
    assert broken.first.stage == "features"
    assert broken.first.images_over == dataset.image_ids


def test_it_becomes_a_file_of_today_in_half_precision(exported: SmallExport, old: Path, tmp_path: Path) -> None:
    convert_file(old, tmp_path / "half.onnx", "fp16")
    model, metadata = read_exported(tmp_path / "half.onnx")
    keys = {entry.key for entry in model.metadata_props}
    assert "asag.schema" in keys
    assert "asag.decoder" not in keys
    assert metadata.precision == "fp16"
    converted = exported.write(tmp_path / "today.onnx", "fp16")
    kinds = [
        {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
        for path in (tmp_path / "half.onnx", converted)
    ]
    assert kinds[0] == kinds[1], "the same weights are in half precision"
    with open_session(tmp_path / "half.onnx", threads=1) as session:
        assert "features/p2" in session.stages(session_image()).values


def test_its_convolutions_can_be_quantized(exported: SmallExport, old: Path) -> None:
    model, metadata = read_exported(old)
    found = quantizable_layers(model.graph, metadata)
    assert list(found) == list(quantizable_layers(exported.proto.graph, exported.metadata))
    assert len(found) == 20


def test_its_times_and_its_work_divide_into_what_it_tells_apart(exported: SmallExport, old: Path) -> None:
    with open_session(old, threads=1) as session:
        (row,) = measure_stages([session], [random_picture(1, 100, 120)], rounds=1, warmup=0, threads=1)
    assert row.reason is None
    assert {"features", "anchors", "detections"} <= set(row.p50_ms)
    assert row.share("other") < 0.02
    whole = {work.stage: work for work in stage_work(exported.proto, exported.metadata)}
    parts = {work.stage: work for work in stage_work(*read_onnx(old))}
    assert list(parts) == ["features", "anchors", "detections"]
    assert parts["features"] == whole["features"]
    later = sum(whole[name].operations for name in ("proposals", "head", "detections"))
    assert parts["detections"].operations == later > 0


def test_inspection_shows_the_choices(old: Path) -> None:
    content = inspect_file(old).to_json()
    values = {row["name"]: row["value"] for row in content["model"]}
    assert content["notes"] == []
    assert values["family"] == "asag"
    assert values["choice: patch_capacity"] == [6, 8]
    assert values["stage: anchors"] == "boxes, valid"


def test_a_graph_without_the_ops_that_tell_the_stages(old: Path, tmp_path: Path) -> None:
    model = onnx.load(old)
    for node in model.graph.node:
        if node.op_type == "GatherAnchors":
            node.op_type = "SomethingElse"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"other\.onnx: not an asag model: its graph has no op GatherAnchors; export"):
        read_onnx(tmp_path / "other.onnx")


def test_an_op_without_its_values(old: Path, tmp_path: Path) -> None:
    model = onnx.load(old)
    for node in model.graph.node:
        if node.op_type == "PyramidRoIAlign":
            del node.input[2:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"other\.onnx: its op PyramidRoIAlign is damaged; export it again"):
        read_onnx(tmp_path / "other.onnx")


def test_an_engine_s_manifest(exported: SmallExport, old: Path) -> None:
    engine = write_engine(old, exported.metadata)
    content = read_json(manifest_path(engine))
    write_json(manifest_path(engine), {**content, "metadata": old_properties(exported.metadata)})
    assert read_manifest(engine).metadata == read_onnx(old)[1]
    content["metadata"]["asag.schema"] = "3"
    write_json(manifest_path(engine), content)
    with pytest.raises(ValueError, match="written by a newer version") as caught:
        read_manifest(engine)
    assert "\n" not in str(caught.value)


def test_a_parity_report(tmp_path: Path) -> None:
    dataset = write_toy_dataset(tmp_path / "data", images=1)
    document = make_document(compare(ToySession(), [], dataset), dataset, pictures=1)
    content = json.loads(json.dumps(document.to_json(), default=list))
    path = tmp_path / "parity.json"
    old = {**content, "metadata": json.loads(json.dumps(old_metadata(document.report.metadata)))}
    metadata = read_document(path, old).report.metadata
    assert (metadata.family, metadata.choices, metadata.schema) == ("asag", CHOICES, 2)
    assert metadata.weights_digest == document.report.metadata.weights_digest
    del old["metadata"]["mean"]
    with pytest.raises(ValueError, match=r"metadata\.mean is missing"):
        read_document(path, old)


def test_a_file_of_a_later_schema(exported: SmallExport, tmp_path: Path) -> None:
    model = exported.model()
    for entry in model.metadata_props:
        if entry.key == "asag.schema":
            entry.value = "3"
    path = tmp_path / "later.onnx"
    onnx.save(model, path)
    for read in (open_session, read_onnx):
        with pytest.raises(ValueError, match=r"later\.onnx: .*schema 3, written by a newer version.*update") as caught:
            read(path)  # type: ignore[operator]
        assert "\n" not in str(caught.value)
    (note,) = inspect_file(path).notes
    assert "newer version" in note


def rewrite_header(source: Path, path: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another description; a field of None is left out."""
    with safetensors.safe_open(source, framework="pt") as file:
        description = json.loads(file.metadata()["asag"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    description = {name: value for name, value in {**description, **changes}.items() if value is not None}
    safetensors.torch.save_file(tensors, path, {"asag": json.dumps(description)})
    return path


def test_a_checkpoint_has_its_patch_capacity_as_a_choice(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "small.safetensors")
    detector, info = load_detector(source)
    config = dataclasses.asdict(detector.config)
    del config["patch_capacity"]
    old_info = {
        "preset": info.preset,
        "category_ids": info.category_ids,
        "category_names": info.category_names,
        "shorter_side": 160,
        "longer_side": 192,
        "input_size": [160, 192],
        "patch_capacity": [3, 5],
    }
    path = rewrite_header(source, tmp_path / "old.safetensors", schema=None, family=None, config=config, info=old_info)
    found, found_info = load_detector(path)
    assert found.config == dataclasses.replace(detector.config, patch_capacity=(3, 5))
    assert found_info == info
    assert found_info.input == InputSpec(160, 192, (160, 192))
    assert load_detector(path, {"patch_capacity": [2, 2]})[0].config.patch_capacity == (2, 2)
    assert inspect_file(path).notes == ()


def test_the_demo_s_weights_have_what_their_preset_has() -> None:
    detector, info = load_detector(DEMO_WEIGHTS)
    assert detector.config.patch_capacity == (16, 32)
    assert info.input == InputSpec(320, 320, (320, 320))


def test_a_checkpoint_of_a_later_schema(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "small.safetensors")
    path = rewrite_header(source, tmp_path / "later.safetensors", schema=3)
    with pytest.raises(
        ValueError, match=r"later\.safetensors: .*written by a newer version \(schema 3, .*update asag"
    ) as caught:
        load_detector(path)
    assert "\n" not in str(caught.value)
