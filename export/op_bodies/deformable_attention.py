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
    large encoder at once would take gigabytes. Rows come from maps with a frame of zeros, so that corners outside need
    no care.
    """
    last = op.Constant(value_ints=[-1])
    heads = op.Shape(value, start=2, end=3)
    # Of each level: its sides, its first cell in the value and its first in the framed maps.
    sides = op.Reshape(op.Constant(value_ints=level_shapes), op.Constant(value_ints=[-1, 2]))
    heights = op.Gather(sides, 0, axis=1)
    widths = op.Gather(sides, 1, axis=1)
    cells = heights * widths
    firsts = op.CumSum(cells, op.Constant(value_int=0), exclusive=1)
    framed = (heights + 2) * (widths + 2)
    framed_ends = op.CumSum(framed, op.Constant(value_int=0))
    framed_firsts = framed_ends - framed
    framed_cells = op.ReduceSum(framed, keepdims=0)

    # The framed maps, rows of channels. All about their cells depends on the attributes alone.
    cell = op.Unsqueeze(op.Range(0, framed_cells, 1), last)
    cell_level = op.ReduceSum(op.Cast(cell >= framed_ends, to=TensorProto.INT64), last, keepdims=0)
    inner = op.Squeeze(cell, last) - op.Gather(framed_firsts, cell_level, axis=0)
    cell_width = op.Gather(widths, cell_level, axis=0)
    cell_height = op.Gather(heights, cell_level, axis=0)
    line = inner / (cell_width + 2)
    column = inner - line * (cell_width + 2) - 1
    line = line - 1
    inside = op.And(op.And(line >= 0, column >= 0), op.And(line < cell_height, column < cell_width))
    source = op.Where(inside, op.Gather(firsts, cell_level, axis=0) + line * cell_width + column, op.ReduceSum(cells))
    zeros = op.Expand(0.0, op.Concat(op.Shape(value, start=0, end=1), [1], op.Shape(value, start=2), axis=0))
    maps = op.Gather(op.Concat(op.Cast(value, to=TensorProto.FLOAT), zeros, axis=1), source, axis=1)
    rows = op.Reshape(maps, op.Concat([-1], op.Shape(value, start=3), axis=0))

    # Of each point.
    point = op.Unsqueeze(op.Range(0, op.Squeeze(op.Shape(locations, start=3, end=4)), 1), last)
    ends = op.CumSum(op.Constant(value_ints=level_points), op.Constant(value_int=0))
    level = op.ReduceSum(op.Cast(point >= ends, to=TensorProto.INT64), last, keepdims=0)
    size = op.Cast(op.Gather(op.Gather(sides, [1, 0], axis=1), level, axis=0), to=TensorProto.FLOAT)
    framed_width = op.Gather(widths, level, axis=0) + 2

    # In cells. What is no number or far outside samples the frame, and must not become an index.
    places = locations * size - 0.5
    places = op.Max(op.Min(op.Where(op.IsNaN(places), -1.0, places), size), -1.0)
    corner = op.Min(op.Floor(places), size - 1.0)
    part = places - corner
    corner = op.Cast(corner, to=TensorProto.INT32)
    image = op.Reshape(op.Range(0, op.Squeeze(op.Shape(value, start=0, end=1)), 1), [-1, 1, 1, 1])
    head = op.Reshape(op.Range(0, op.Squeeze(heads), 1), [-1, 1])
    origin = (image * framed_cells + op.Gather(framed_firsts, level, axis=0) + framed_width + 1) * heads + head
    right = op.Cast(heads, to=TensorProto.INT32)
    down = op.Cast(framed_width * heads, to=TensorProto.INT32)
    row = op.Cast(origin, to=TensorProto.INT32) + op.Gather(corner, 1, axis=4) * down
    row = row + op.Gather(corner, 0, axis=4) * right

    share = op.Cast(weights, to=TensorProto.FLOAT)
    x = op.Gather(part, 0, axis=4)
    y = op.Gather(part, 1, axis=4)
    lower = share * y
    upper = share * (1.0 - y)
    left = 1.0 - x
    axis = op.Constant(value_ints=[3])
    attended = op.MatMul(op.Unsqueeze(upper * left, axis), op.Gather(rows, row, axis=0))
    attended = attended + op.MatMul(op.Unsqueeze(upper * x, axis), op.Gather(rows, row + right, axis=0))
    row = row + down
    attended = attended + op.MatMul(op.Unsqueeze(lower * left, axis), op.Gather(rows, row, axis=0))
    attended = attended + op.MatMul(op.Unsqueeze(lower * x, axis), op.Gather(rows, row + right, axis=0))
    queries = op.Concat(op.Shape(locations, start=0, end=2), [-1], axis=0)
    result = op.CastLike(op.Reshape(attended, queries), value)
    return result
