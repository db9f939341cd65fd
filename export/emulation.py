"""What bfloat16 costs, measured where nothing executes it: `python -m export.emulation MODEL.onnx -o EMULATED.onnx`.

ONNX Runtime has no bfloat16 convolution on a CPU. The emulated file computes in float32 and rounds every weight and
every result that is bfloat16 in the original, so that `asag evaluate` and `asag parity` show its accuracy. An engine
keeps more digits between layers that it fuses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from asag.export.exported_file import read_exported
from asag.export.op_bodies.domain import OPSET_VERSION
from asag.export.operator_set import STANDARD_DOMAINS
from asag.runtime.files import write_bytes
from asag.runtime.metadata import ModelMetadata
from asag.runtime.onnx_file import write_metadata


def emulate_bfloat16(proto: onnx.ModelProto, metadata: ModelMetadata) -> onnx.ModelProto:
    """A copy of `proto` (from :func:`export.precision.convert_precision` with "bf16") in float32 with the values of
    bfloat16; its metadata name the precision "bf16 emulated".
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    rounded = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in graph.value_info:
        if value.name in rounded:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes = [each for node in graph.node for each in _with_rounding(node, rounded)]
    del graph.node[:]
    graph.node.extend(nodes)
    # Without bfloat16 operators the set of the export will do, which more versions of ONNX Runtime read.
    for opset in (entry for owner in (result, *result.functions) for entry in owner.opset_import):
        if opset.domain in STANDARD_DOMAINS:
            opset.version = OPSET_VERSION
    write_metadata(result, dataclasses.replace(metadata, precision="bf16 emulated"))
    return result


def _with_rounding(node: onnx.NodeProto, rounded: Collection[str]) -> Iterator[onnx.NodeProto]:
    """The node, computing in float32, and what rounds its outputs of these names."""
    names = [name for name in node.output if name in rounded]
    node.output[:] = [f"{name}_exact" if name in rounded else name for name in node.output]
    if names and node.op_type == "Cast":
        node.attribute[0].i = TensorProto.FLOAT
    yield node
    for name in names:
        yield helper.make_node("Cast", [f"{name}_exact"], [f"{name}_bfloat16"], to=TensorProto.BFLOAT16)
        yield helper.make_node("Cast", [f"{name}_bfloat16"], [name], to=TensorProto.FLOAT)


@click.command()
@click.argument("model", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True)
def main(model: Path, output: Path) -> None:
    """Write MODEL, exported with `--precision bf16`, as a float32 file that rounds as it does."""
    try:
        proto, metadata = read_exported(model)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    if metadata.precision != "bf16":
        raise click.ClickException(f"{model} is {metadata.precision}; export it with --precision bf16")
    write_bytes(output, emulate_bfloat16(proto, metadata).SerializeToString())


if __name__ == "__main__":
    main()
