"""Body of `SampleGrid`; the definition is `asag.ops.sample_grid`.

Its operators mean the same in operator sets 16 to 23, as those of `MultiScaleDeformableAttention`.
"""

from onnx import TensorProto
from onnxscript import script

from asag.export.op_bodies.domain import asag_opset, op


@script(asag_opset, default_opset=op)
def SampleGrid(value, grid, padding: int, align_corners: int):  # noqa: N802
    """A sample is a weighted sum of four gathered rows of channels, one for each corner."""
    channels = op.Shape(value, start=1, end=2)
    height = op.Shape(value, start=2, end=3)
    width = op.Shape(value, start=3, end=4)
    columns = op.Cast(width, to=TensorProto.FLOAT)
    lines = op.Cast(height, to=TensorProto.FLOAT)
    aligned = op.Cast(op.Constant(value_int=align_corners), to=TensorProto.FLOAT)
    to_border = op.Equal(op.Constant(value_int=padding), 1)

    # In cells. What is no number or far outside samples nothing, and must not become an index.
    places = op.Where(op.IsNaN(grid), -3.0, op.Max(op.Min(grid, 3.0), -3.0)) + 1.0
    x = (op.Gather(places, 0, axis=3) * (columns - aligned) - (1.0 - aligned)) / 2.0
    y = (op.Gather(places, 1, axis=3) * (lines - aligned) - (1.0 - aligned)) / 2.0
    x = op.Where(to_border, op.Max(op.Min(x, columns - 1.0), 0.0), x)
    y = op.Where(to_border, op.Max(op.Min(y, lines - 1.0), 0.0), y)
    left = op.Floor(x)
    top = op.Floor(y)
    right = left + 1.0
    bottom = top + 1.0
    held_left = op.Max(op.Min(left, columns - 1.0), 0.0)
    held_right = op.Max(op.Min(right, columns - 1.0), 0.0)
    held_top = op.Max(op.Min(top, lines - 1.0), 0.0)
    held_bottom = op.Max(op.Min(bottom, lines - 1.0), 0.0)
    share_left = op.Where(op.Equal(left, held_left), right - x, 0.0)
    share_right = op.Where(op.Equal(right, held_right), x - left, 0.0)
    share_top = op.Where(op.Equal(top, held_top), bottom - y, 0.0)
    share_bottom = op.Where(op.Equal(bottom, held_bottom), y - top, 0.0)

    image = op.Reshape(op.Range(0, op.Squeeze(op.Shape(value, start=0, end=1)), 1), [-1, 1, 1])
    top_line = (image * height + op.Cast(held_top, to=TensorProto.INT64)) * width
    bottom_line = (image * height + op.Cast(held_bottom, to=TensorProto.INT64)) * width
    column_left = op.Cast(held_left, to=TensorProto.INT64)
    column_right = op.Cast(held_right, to=TensorProto.INT64)

    last = op.Constant(value_ints=[3])
    cells = op.Transpose(op.Cast(value, to=TensorProto.FLOAT), perm=[0, 2, 3, 1])
    rows = op.Reshape(cells, op.Concat([-1], channels, axis=0))
    sampled = op.Unsqueeze(share_top * share_left, last) * op.Gather(rows, top_line + column_left, axis=0)
    sampled = sampled + op.Unsqueeze(share_top * share_right, last) * op.Gather(rows, top_line + column_right, axis=0)
    sampled = sampled + op.Unsqueeze(share_bottom * share_left, last) * op.Gather(
        rows, bottom_line + column_left, axis=0
    )
    sampled = sampled + op.Unsqueeze(share_bottom * share_right, last) * op.Gather(
        rows, bottom_line + column_right, axis=0
    )
    result = op.CastLike(op.Transpose(sampled, perm=[0, 3, 1, 2]), value)
    return result
