"""Body of `PyramidRoIAlign`; the definition is `asag.ops.pyramid_roi_align`."""

from onnx import TensorProto
from onnxscript import script

from asag.export.op_bodies.domain import asag_opset, op
from asag.export.op_bodies.pyramid import FlattenPyramid


@script(asag_opset, default_opset=op)
def PyramidRoIAlign(p2, p3, p4, p5, boxes, maps: int = 4, first_stride: int = 4):  # noqa: N802
    """Each bin is a weighted sum of 16 gathered cells: two samples per axis, two neighbours per sample."""
    cells, heights, widths, firsts = FlattenPyramid(p2, p3, p4, p5)
    channels = op.Shape(p2, start=1, end=2)
    cell_count = op.Shape(cells, start=1, end=2)
    batch_queries = op.Shape(boxes, start=0, end=2)

    centre = op.Slice(boxes, [0], [2], [2])
    extent = op.Slice(boxes, [2], [4], [2])
    scale = op.Sqrt(op.Gather(extent, 0, axis=2) * op.Gather(extent, 1, axis=2))
    ratio = op.Log(op.Max(scale / 224.0, 1e-30)) / 0.6931471805599453
    finest_stride = op.Cast(op.Constant(value_int=first_stride), to=TensorProto.FLOAT)
    finest = op.Round(op.Log(finest_stride) / 0.6931471805599453)
    coarsest = finest + op.Cast(op.Constant(value_int=maps), to=TensorProto.FLOAT) - 1.0
    level = op.Clip(op.Floor(4.0 + ratio + 1e-6), finest, coarsest) - finest
    stride = op.Unsqueeze(finest_stride * op.Pow(2.0, level), op.Constant(value_ints=[2]))
    level_index = op.Cast(level, to=TensorProto.INT64)
    height = op.Gather(heights, level_index, axis=0)
    width = op.Gather(widths, level_index, axis=0)
    first = op.Gather(firsts, level_index, axis=0)
    last = op.Unsqueeze(
        op.Cast(op.Concat(op.Unsqueeze(width, [2]), op.Unsqueeze(height, [2]), axis=2), to=TensorProto.FLOAT) - 1.0,
        op.Constant(value_ints=[3]),
    )

    low = (centre - extent / 2.0) / stride
    size = op.Max(extent / stride, 1.0)
    sample = op.Cast(op.Range(0, 14, 1), to=TensorProto.FLOAT) + 0.5
    at = op.Unsqueeze(low, [3]) + op.Unsqueeze(size / 14.0, [3]) * sample
    inside = op.Cast(op.And(at >= -1.0, at <= last + 1.0), to=TensorProto.FLOAT) / 2.0
    at = op.Max(op.Min(at, last), 0.0)
    before = op.Floor(at)
    after = op.Min(before + 1.0, last)
    fraction = at - before
    neighbours = op.Cast(op.Concat(op.Unsqueeze(before, [4]), op.Unsqueeze(after, [4]), axis=4), to=TensorProto.INT64)
    weights = op.Concat(
        op.Unsqueeze(inside * (1.0 - fraction), [4]),
        op.Unsqueeze(inside * fraction, [4]),
        axis=4,
    )
    x = op.Reshape(op.Gather(neighbours, 0, axis=2), op.Concat(batch_queries, [1, 7, 1, 4], axis=0))
    y = op.Reshape(op.Gather(neighbours, 1, axis=2), op.Concat(batch_queries, [7, 1, 4, 1], axis=0))
    weight_x = op.Reshape(op.Gather(weights, 0, axis=2), op.Concat(batch_queries, [1, 7, 1, 4], axis=0))
    weight_y = op.Reshape(op.Gather(weights, 1, axis=2), op.Concat(batch_queries, [7, 1, 4, 1], axis=0))

    image = op.Reshape(op.Range(0, op.Squeeze(op.Shape(boxes, start=0, end=1)), 1), [-1, 1])
    origin = op.Unsqueeze(image * cell_count + first, [2, 3, 4, 5])
    row = origin + y * op.Unsqueeze(width, [2, 3, 4, 5]) + x
    bins = op.Concat(batch_queries, [49, 16], axis=0)
    rows = op.Reshape(cells, op.Concat([-1], channels, axis=0))
    # Maps may be of half precision: sums are float32, the result has the maps' type.
    taps = op.Cast(op.Gather(rows, op.Reshape(row, bins), axis=0), to=TensorProto.FLOAT)
    weight = op.Unsqueeze(op.Reshape(weight_y * weight_x, bins), [3])
    pooled = op.Squeeze(op.MatMul(weight, taps), [3])
    result = op.Transpose(pooled, perm=[0, 1, 3, 2])
    rois = op.CastLike(op.Reshape(result, op.Concat(batch_queries, channels, [7, 7], axis=0)), p2)
    return rois
