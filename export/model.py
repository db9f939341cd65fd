"""A checkpoint becomes one ONNX file that runs anywhere."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from asag.deploy import DeployedDetector
from asag.export.op_bodies import bodies_of
from asag.export.op_bodies.domain import DOMAIN_VERSION, OPSET_VERSION
from asag.export.operators import translation_table
from asag.export.precision import convert_precision
from asag.export.stage_names import name_stages, stage_translation
from asag.runtime.files import write_bytes
from asag.runtime.metadata import ModelMetadata
from asag.runtime.onnx_file import write_metadata
from asag.trt_plugins.operations import DOMAIN

INPUT_NAMES = ("images", "sizes")
OUTPUT_NAMES = ("boxes", "scores", "labels", "overflow")
LARGEST_BATCH = 1024


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote and what it left out."""

    path: Path
    bytes: int
    nodes: int
    operations: dict[str, int]
    """Custom ops by name and how often the graph uses them."""
    parameters_left_out: int
    """Of what only training needs, and of the folded norms."""
    metadata: ModelMetadata


def export_onnx(
    model: DeployedDetector,
    path: str | Path,
    precision: str = "fp32",
) -> ExportReport:
    """Write `model` to `path` as ONNX with dynamic batch, the custom ops as nodes with model-local bodies, and
    metadata.

    precision: "fp32", or "fp16" or "bf16" for backbone, neck and large linear layers (see `export.precision`). The file
    is checked before it is written, whole or not at all. Raises ValueError when the checker refuses it, or a stage that
    the family declares is not in the graph.
    """
    path = Path(path)
    metadata = ModelMetadata(**{**model.describe(), "precision": precision})
    proto = convert_precision(build_onnx(model), precision, metadata)
    write_metadata(proto, metadata)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"the model exported for {path} is not valid ONNX: {' '.join(str(error).split())}") from None
    payload = proto.SerializeToString()
    write_bytes(path, payload)
    kept = sum(parameter.numel() for parameter in model.parameters())
    return ExportReport(
        path=path,
        bytes=len(payload),
        nodes=len(proto.graph.node),
        operations=_count_operations(proto),
        parameters_left_out=max(model.parameters_trained - kept, 0),
        metadata=metadata,
    )


def build_onnx(model: DeployedDetector) -> onnx.ModelProto:
    """The model as ONNX, with the ops' bodies attached and shapes inferred for the standard operators."""
    model = model.eval()
    height, width = model.input_size
    # Two different images: a batch of one would be taken for a constant.
    images = torch.zeros((2, 3, height, width), dtype=torch.uint8 if model.input_type == "uint8" else torch.float32)
    sizes = torch.tensor([[height, width], [height // 2, width // 2]], dtype=torch.float32)
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad(), _quiet(), _own_refusals():
        program = torch.onnx.export(
            model,
            (images, sizes),
            dynamo=True,
            opset_version=OPSET_VERSION,
            input_names=list(INPUT_NAMES),
            output_names=list(OUTPUT_NAMES),
            dynamic_shapes=({0: batch}, {0: batch}),
            custom_translation_table=translation_table() | stage_translation(),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    if not proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ValueError("the forward pass fixes the number of images: ask a tensor's `shape` for it, not `len`")
    name_stages(proto.graph, model.stages)
    del proto.functions[:]
    proto.functions.extend(bodies_of(proto.graph.node))
    if all(entry.domain != DOMAIN for entry in proto.opset_import):
        proto.opset_import.add(domain=DOMAIN, version=DOMAIN_VERSION)
    _name_plugins(proto)
    _drop_source_annotations(proto)
    return proto


def _name_plugins(proto: onnx.ModelProto) -> None:
    """Say on each node in which namespace TensorRT finds its plugin; other runtimes do not look at it."""
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            node.attribute.append(onnx.helper.make_attribute("plugin_namespace", DOMAIN))


def _drop_source_annotations(proto: onnx.ModelProto) -> None:
    """Remove what the exporter notes about Python source lines: it names folders of the exporting machine."""
    for graph_item in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del graph_item.metadata_props[:]
        graph_item.doc_string = ""
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]


def _count_operations(proto: onnx.ModelProto) -> dict[str, int]:
    names = [node.op_type for node in proto.graph.node if node.domain == DOMAIN]
    return {name: names.count(name) for name in sorted(set(names))}


@contextlib.contextmanager
def _own_refusals() -> Iterator[None]:
    """What a forward pass refuses, an input too small for its queries for example, without the exporter's pages."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        if type(error.__cause__) is ValueError:
            raise error.__cause__ from None
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and known warnings off the terminal; its errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
