"""Body of `GatherAnchors`; the definition is `asag.ops.gather_anchors`."""

from onnx import TensorProto
from onnxscript import script

from asag.export.op_bodies.domain import asag_opset, op


@script(asag_opset, default_opset=op)
def GatherAnchors(anchors, selectable, first: int, keep_threshold: float, fewest: int, most: int):  # noqa: N802
    """Two sorts by TopK, which puts the lower index first among equals, as the definition's stable sort does."""
    axis = op.Constant(value_ints=[1])
    start = op.Constant(value_ints=[0])
    first_count = op.Reshape(op.Constant(value_int=first), axis)
    total = op.Shape(anchors, start=1, end=2)

    raw = op.Gather(anchors, 4, axis=2)
    confidence = op.Where(op.IsNaN(raw), -1.0, raw)
    keep = op.And(selectable, confidence > op.Constant(value_float=keep_threshold))
    keep_first = op.Slice(keep, start, first_count, axis)
    count = op.ReduceSum(op.Cast(keep_first, to=TensorProto.INT64), axis, keepdims=1)
    few = count < op.Constant(value_int=fewest)

    _, by_confidence = op.TopK(op.Slice(confidence, start, first_count, axis), first_count, axis=1, largest=1, sorted=1)
    position = op.Range(0, op.Squeeze(total), 1)
    position_first = op.Slice(position, start, first_count, start)
    position_rest = op.Slice(position, first_count, total, start)
    order_first = op.Where(few, by_confidence, position_first)
    rest_shape = op.Concat(op.Shape(anchors, start=0, end=1), total - first_count, axis=0)
    order = op.Concat(order_first, op.Expand(position_rest, rest_shape), axis=1)
    confidence = op.GatherElements(confidence, order, axis=1)
    # Where has no boolean kernel in ONNX Runtime.
    fewest_first = op.And(few, position_first < op.Constant(value_int=fewest))
    kept = op.Or(fewest_first, op.And(op.Not(few), keep_first))
    kept = op.And(kept, op.Slice(confidence, start, first_count, axis) >= 0.0)
    keep = op.Concat(kept, op.Slice(keep, first_count, total, axis), axis=1)

    limit = op.Constant(value_int=most)
    too_many = op.ReduceSum(op.Cast(keep, to=TensorProto.INT64), axis, keepdims=1) > limit
    by_position = op.Cast(total - position, to=TensorProto.FLOAT)
    key = op.Where(keep, op.Where(too_many, confidence, by_position), -1.0)
    best, chosen = op.TopK(key, op.Reshape(limit, axis), axis=1, largest=1, sorted=1)
    valid = best >= 0.0
    source = op.Unsqueeze(op.GatherElements(order, chosen, axis=1), op.Constant(value_ints=[2]))
    four = op.Concat(op.Shape(source, start=0, end=2), op.Constant(value_ints=[4]), axis=0)
    boxes = op.GatherElements(op.Slice(anchors, [0], [4], [2]), op.Expand(source, four), axis=1)
    queries = op.Where(op.Unsqueeze(valid, op.Constant(value_ints=[2])), boxes, 0.0)
    return queries, valid
