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
    last = op.Constant(value_ints=[-1])
    heads = op.Shape(value, start=2, end=3)
    cells = op.Shape(value, start=1, end=2)
    # Of each level, then of each point.
    sides = op.Reshape(op.Constant(value_ints=level_shapes), op.Constant(value_ints=[-1, 2]))
    widths = op.Gather(sides, 1, axis=1)
    firsts = op.CumSum(op.Gather(sides, 0, axis=1) * widths, op.Constant(value_int=0), exclusive=1)
    ends = op.CumSum(op.Constant(value_ints=level_points), op.Constant(value_int=0))
    point = op.Unsqueeze(op.Range(0, op.Squeeze(op.Shape(locations, start=3, end=4)), 1), last)
    level = op.ReduceSum(op.Cast(point >= ends, to=TensorProto.INT64), last, keepdims=0)
    size = op.Cast(op.Gather(op.Gather(sides, [1, 0], axis=1), level, axis=0), to=TensorProto.FLOAT)
    last_first = op.Max(size - 2.0, 0.0)
    wide = size > 1.0
    reach = op.Where(wide, 2.0, -1.0)
    step = op.Cast(wide, to=TensorProto.INT32)

    # (x, y) in cells. Two neighbours inside the map are read, the nearest where the place is outside; each weighs what
    # it is nearer than one cell. A map of one cell has no second. What is no number must not become an index.
    places = locations * size - 0.5
    places = op.Where(op.IsNaN(places), -2.0, places)
    first = op.Max(op.Min(op.Floor(places), last_first), 0.0)
    part = places - first
    near = op.Relu(1.0 - op.Abs(part))
    far = op.Relu(op.Min(part, reach - part))

    image = op.Reshape(op.Range(0, op.Squeeze(op.Shape(value, start=0, end=1)), 1), [-1, 1, 1, 1])
    head = op.Reshape(op.Range(0, op.Squeeze(heads), 1), [-1, 1])
    origin = op.Cast((image * cells + op.Gather(firsts, level, axis=0)) * heads + head, to=TensorProto.INT32)
    across = op.Cast(heads, to=TensorProto.INT32)
    down = op.Cast(op.Gather(widths, level, axis=0) * heads, to=TensorProto.INT32)
    cell = op.Cast(first, to=TensorProto.INT32)
    corner = op.Gather(cell, 1, axis=4) * down + (op.Gather(cell, 0, axis=4) * across + origin)
    right = op.Gather(step, 0, axis=1) * across
    below = op.Gather(step, 1, axis=1) * down
    both = corner + (right + below)

    share = op.Cast(weights, to=TensorProto.FLOAT)
    upper = share * op.Gather(near, 1, axis=4)
    lower = share * op.Gather(far, 1, axis=4)
    share_left = op.Gather(near, 0, axis=4)
    share_right = op.Gather(far, 0, axis=4)
    rows = op.Reshape(op.Cast(value, to=TensorProto.FLOAT), op.Concat([-1], op.Shape(value, start=3), axis=0))
    axis = op.Constant(value_ints=[3])
    attended = op.MatMul(op.Unsqueeze(upper * share_left, axis), op.Gather(rows, corner, axis=0))
    attended = attended + op.MatMul(op.Unsqueeze(upper * share_right, axis), op.Gather(rows, corner + right, axis=0))
    attended = attended + op.MatMul(op.Unsqueeze(lower * share_left, axis), op.Gather(rows, corner + below, axis=0))
    attended = attended + op.MatMul(op.Unsqueeze(lower * share_right, axis), op.Gather(rows, both, axis=0))
    queries = op.Concat(op.Shape(locations, start=0, end=2), [-1], axis=0)
    result = op.CastLike(op.Reshape(attended, queries), value)
    return result
