"""Body of `SamplingMixing`; the definition is `asag.ops.sampling_mixing`."""

from collections.abc import Mapping
from typing import Any

from onnx import FunctionProto, TensorProto
from onnxscript import script

from asag.export.op_bodies.domain import asag_opset, op
from asag.export.op_bodies.pyramid import FlattenPyramid
from asag.trt_plugins.operations.sampling_mixing import ACTIVATIONS


@script(asag_opset, default_opset=op)
def SamplingMixing(  # noqa: N802
    p2, p3, p4, p5, points, parameters, mixed_points: int, activation: int = 0, point_unit: int = 4
):
    """A sample is a weighted sum of 16 gathered rows: four levels, two neighbours per axis.

    As it stands here the activation is the GELU; :func:`specialize` makes it another one.
    """
    cells, heights, widths, firsts = FlattenPyramid(p2, p3, p4, p5)
    groups = op.Shape(points, start=2, end=3)
    count = op.Shape(points, start=3, end=4)
    per_group = op.Shape(p2, start=1, end=2) / groups
    cell_count = op.Shape(cells, start=1, end=2)
    places = op.Shape(points, start=0, end=4)
    batch_queries = op.Shape(points, start=0, end=2)

    # P2's cells are 4 pixels wide; the quotient of logarithms is exact where the unit is a power of two.
    unit = op.Cast(op.Constant(value_int=point_unit), to=TensorProto.FLOAT)
    first_level = op.Log(4.0 / unit) / op.Log(2.0)
    z = op.Slice(points, [2], [3], [4])
    distance = z - (first_level + op.Constant(value_floats=[0.0, 1.0, 2.0, 3.0]))
    level_weight = op.Unsqueeze(op.Softmax(-0.5 * distance * distance, axis=-1), [5])

    # In cells of P2..P5; the last axis is the pair of neighbours.
    units_per_cell = op.Constant(value_floats=[4.0, 8.0, 16.0, 32.0]) / unit
    pair = op.Constant(value_floats=[0.0, 1.0])
    x = op.Unsqueeze(op.Slice(points, [0], [1], [4]) / units_per_cell - 0.5, [5])
    y = op.Unsqueeze(op.Slice(points, [1], [2], [4]) / units_per_cell - 0.5, [5])
    # Far outside, all weights are zero; the bound keeps the conversion to integers defined.
    x = op.Clip(x, -1e6, 1e6)
    y = op.Clip(y, -1e6, 1e6)
    tap_x = op.Floor(x) + pair
    tap_y = op.Floor(y) + pair
    last_x = op.Unsqueeze(op.Cast(widths, to=TensorProto.FLOAT) - 1.0, [1])
    last_y = op.Unsqueeze(op.Cast(heights, to=TensorProto.FLOAT) - 1.0, [1])
    held_x = op.Max(op.Min(tap_x, last_x), 0.0)
    held_y = op.Max(op.Min(tap_y, last_y), 0.0)
    weight_x = op.Where(op.Equal(tap_x, held_x), 1.0 - op.Abs(x - tap_x), 0.0)
    weight_y = op.Where(op.Equal(tap_y, held_y), 1.0 - op.Abs(y - tap_y), 0.0) * level_weight

    index_x = op.Unsqueeze(op.Cast(held_x, to=TensorProto.INT64), [5])
    index_y = op.Unsqueeze(op.Cast(held_y, to=TensorProto.INT64) * op.Unsqueeze(widths, [1]), [6])
    image = op.Reshape(op.Range(0, op.Squeeze(op.Shape(points, start=0, end=1)), 1), [-1, 1, 1, 1, 1, 1, 1])
    group = op.Reshape(op.Range(0, op.Squeeze(groups), 1), [-1, 1, 1, 1, 1])
    first = op.Unsqueeze(firsts, [1, 2])
    row = (image * cell_count + first + index_y + index_x) * groups + group
    taps = op.Concat(places, [16], axis=0)
    rows = op.Reshape(cells, op.Concat([-1], per_group, axis=0))
    # Maps and parameters may be of half precision: products and norms are float32, the result has the maps' type.
    gathered = op.Cast(op.Gather(rows, op.Reshape(row, taps), axis=0), to=TensorProto.FLOAT)
    weight = op.Unsqueeze(op.Reshape(op.Unsqueeze(weight_y, [6]) * op.Unsqueeze(weight_x, [5]), taps), [4])
    samples = op.Squeeze(op.MatMul(weight, gathered), [4])

    mixed_count = op.Reshape(op.Constant(value_int=mixed_points), op.Constant(value_ints=[1]))
    channel_size = per_group * per_group
    matrices = op.Cast(parameters, to=TensorProto.FLOAT)
    by_group = op.Reshape(matrices, op.Concat(batch_queries, groups, [-1], axis=0))
    channel_part = op.Slice(by_group, [0], channel_size, [3])
    point_part = op.Slice(by_group, channel_size, op.Shape(by_group, start=3, end=4), [3])
    group_shape = op.Concat(batch_queries, groups, axis=0)
    channel_matrix = op.Reshape(channel_part, op.Concat(group_shape, per_group, per_group, axis=0))
    point_matrix = op.Reshape(point_part, op.Concat(group_shape, mixed_count, count, axis=0))

    # The norms have no parameters; the operator wants a scale.
    inner = op.Expand(1.0, op.Concat(count, per_group, axis=0))
    outer = op.Expand(1.0, op.Concat(mixed_count, per_group, axis=0))
    mixed = op.Gelu(op.LayerNormalization(op.MatMul(samples, channel_matrix), inner, axis=-2, epsilon=1e-5))
    mixed = op.Gelu(op.LayerNormalization(op.MatMul(point_matrix, mixed), outer, axis=-2, epsilon=1e-5))
    flat = op.CastLike(op.Reshape(mixed, op.Concat(batch_queries, [-1], axis=0)), p2)
    return flat


def specialize(body: FunctionProto, attributes: Mapping[str, Any]) -> None:
    """Put the activation of nodes with these attributes into the body, in place.

    A body that chose when it runs would need a branch, which not every target implements, or both results.
    """
    if ACTIVATIONS[attributes["activation"]] == "relu":
        for node in body.node:
            if node.op_type == "Gelu":
                node.op_type = "Relu"
