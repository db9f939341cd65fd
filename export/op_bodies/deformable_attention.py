"""Body of `MultiScaleDeformableAttention`; the definition is `asag.ops.deformable_attention`.

Its operators mean the same in operator sets 16 to 23, so that it can go into files of any of these.
"""

from collections.abc import Sequence

from onnx import TensorProto
from onnxscript import script

from asag.export.op_bodies.domain import asag_opset, op


@script(asag_opset, default_opset=op)
def MultiScaleDeformableAttention(  # noqa: N802
    value, locations, weights, level_shapes: Sequence[int], level_points: Sequence[int]
):
    """A sample is a weighted sum of four gathered rows, one for each corner: in four products, since all corners of a
    large encoder at once would take gigabytes.
    """
    heads = op.Shape(value, start=2, end=3)
    cells = op.Shape(value, start=1, end=2)
    # Of each level, then of each point.
    sides = op.Reshape(op.Constant(value_ints=level_shapes), op.Constant(value_ints=[-1, 2]))
    heights = op.Gather(sides, 0, axis=1)
    widths = op.Gather(sides, 1, axis=1)
    firsts = op.CumSum(heights * widths, op.Constant(value_int=0), exclusive=1)
    ends = op.CumSum(op.Constant(value_ints=level_points), op.Constant(value_int=0))
    point = op.Unsqueeze(op.Range(0, op.Squeeze(op.Shape(locations, start=3, end=4)), 1), op.Constant(value_ints=[1]))
    level = op.ReduceSum(op.Cast(point >= ends, to=TensorProto.INT64), op.Constant(value_ints=[1]), keepdims=0)
    width = op.Gather(widths, level, axis=0)
    columns = op.Cast(width, to=TensorProto.FLOAT)
    lines = op.Cast(op.Gather(heights, level, axis=0), to=TensorProto.FLOAT)

    # In cells. What is no number or far outside samples nothing, and must not become an index.
    x = op.Gather(locations, 0, axis=4) * columns - 0.5
    y = op.Gather(locations, 1, axis=4) * lines - 0.5
    x = op.Max(op.Min(op.Where(op.IsNaN(x), -2.0, x), columns + 1.0), -2.0)
    y = op.Max(op.Min(op.Where(op.IsNaN(y), -2.0, y), lines + 1.0), -2.0)
    left = op.Floor(x)
    top = op.Floor(y)
    right = left + 1.0
    bottom = top + 1.0
    held_left = op.Max(op.Min(left, columns - 1.0), 0.0)
    held_right = op.Max(op.Min(right, columns - 1.0), 0.0)
    held_top = op.Max(op.Min(top, lines - 1.0), 0.0)
    held_bottom = op.Max(op.Min(bottom, lines - 1.0), 0.0)
    share = op.Cast(weights, to=TensorProto.FLOAT)
    share_left = op.Where(op.Equal(left, held_left), right - x, 0.0)
    share_right = op.Where(op.Equal(right, held_right), x - left, 0.0)
    share_top = op.Where(op.Equal(top, held_top), bottom - y, 0.0) * share
    share_bottom = op.Where(op.Equal(bottom, held_bottom), y - top, 0.0) * share

    image = op.Reshape(op.Range(0, op.Squeeze(op.Shape(value, start=0, end=1)), 1), [-1, 1, 1, 1])
    head = op.Reshape(op.Range(0, op.Squeeze(heads), 1), [-1, 1])
    first = image * cells + op.Gather(firsts, level, axis=0)
    top_line = first + op.Cast(held_top, to=TensorProto.INT64) * width
    bottom_line = first + op.Cast(held_bottom, to=TensorProto.INT64) * width
    column_left = op.Cast(held_left, to=TensorProto.INT64)
    column_right = op.Cast(held_right, to=TensorProto.INT64)

    rows = op.Reshape(op.Cast(value, to=TensorProto.FLOAT), op.Concat([-1], op.Shape(value, start=3, end=4), axis=0))
    row = op.Constant(value_ints=[3])
    attended = op.MatMul(
        op.Unsqueeze(share_top * share_left, row), op.Gather(rows, (top_line + column_left) * heads + head, axis=0)
    )
    attended = attended + op.MatMul(
        op.Unsqueeze(share_top * share_right, row), op.Gather(rows, (top_line + column_right) * heads + head, axis=0)
    )
    attended = attended + op.MatMul(
        op.Unsqueeze(share_bottom * share_left, row),
        op.Gather(rows, (bottom_line + column_left) * heads + head, axis=0),
    )
    attended = attended + op.MatMul(
        op.Unsqueeze(share_bottom * share_right, row),
        op.Gather(rows, (bottom_line + column_right) * heads + head, axis=0),
    )
    queries = op.Concat(op.Shape(locations, start=0, end=2), [-1], axis=0)
    result = op.CastLike(op.Reshape(attended, queries), value)
    return result
