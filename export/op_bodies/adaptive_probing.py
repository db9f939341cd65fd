"""Body of `AdaptiveProbing`; the definition is `asag.ops.adaptive_probing`."""

from onnx import TensorProto
from onnxscript import BOOL, FLOAT, INT64, graph, script

from asag.export.op_bodies.domain import asag_opset, op


@script(asag_opset, default_opset=op)
def AdaptiveProbing(anchors, valid, feature, sizes, stride: int, capacity: int):  # noqa: N802
    """Greedy suppression in `capacity` rounds of "take the best, drop what overlaps it": the trip count is constant."""
    places = op.Constant(value_int=capacity)
    cell_size = op.Cast(op.Constant(value_int=stride), to=TensorProto.FLOAT)
    side = cell_size * 15.0
    limit = side / 2.0

    x = op.Gather(anchors, 0, axis=2)
    y = op.Gather(anchors, 1, axis=2)
    width = op.Gather(anchors, 2, axis=2)
    height = op.Gather(anchors, 3, axis=2)
    confidence = op.Gather(anchors, 4, axis=2)
    small = op.And(width < limit, height < limit)
    asks = op.And(confidence > 0.1, confidence < 0.7)
    candidate = op.And(op.And(valid, small), asks)

    position = op.Range(0, op.Squeeze(op.Shape(anchors, start=1, end=2)), 1)
    true = op.Cast(op.Constant(value_int=1), to=TensorProto.BOOL)
    all_asking = op.Where(candidate, confidence, -1.0)

    @graph()
    def take_best(step: INT64, going: BOOL, asking: FLOAT["B", "A"]):  # noqa: F821 (names of axes)
        """One round: the most confident square, and what it leaves. Only the trip count ends the loop."""
        best = op.ReduceMax(asking, op.Constant(value_ints=[1]), keepdims=1)
        index = op.ArgMax(asking, axis=1, keepdims=1)
        shared_x = op.Relu(side - op.Abs(x - op.GatherElements(x, index, axis=1)))
        shared_y = op.Relu(side - op.Abs(y - op.GatherElements(y, index, axis=1)))
        shared = shared_x * shared_y
        overlaps = shared / (2.0 * side * side - shared) > 0.25
        left = op.Where(op.Or(overlaps, op.Equal(position, index)), -1.0, asking)
        return op.Identity(true), left, index, best

    remaining, indices, priorities = op.Loop(places, None, all_asking, body=take_best)
    chosen = op.Transpose(op.Squeeze(indices, op.Constant(value_ints=[2])), perm=[1, 0])
    priority = op.Transpose(op.Squeeze(priorities, op.Constant(value_ints=[2])), perm=[1, 0])
    taken = priority > 0.0
    overflow = op.Squeeze(
        op.ReduceSum(op.Cast(remaining > 0.0, to=TensorProto.INT32), op.Constant(value_ints=[1])),
        op.Constant(value_ints=[1]),
    )

    end = op.Ceil(sizes / cell_size) - 15.0
    start_x = op.Floor(op.GatherElements(x, chosen, axis=1) / cell_size - 7.5)
    start_y = op.Floor(op.GatherElements(y, chosen, axis=1) / cell_size - 7.5)
    start_x = op.Relu(op.Min(start_x, op.Slice(end, [1], [2], [1])))
    start_y = op.Relu(op.Min(start_y, op.Slice(end, [0], [1], [1])))
    corner_x = op.Cast(op.Where(taken, start_x, 0.0), to=TensorProto.INT64)
    corner_y = op.Cast(op.Where(taken, start_y, 0.0), to=TensorProto.INT64)
    last = op.Constant(value_ints=[-1])
    corners = op.Concat(op.Unsqueeze(corner_x, last), op.Unsqueeze(corner_y, last), axis=-1)

    map_height = op.Shape(feature, start=2, end=3)
    map_width = op.Shape(feature, start=3, end=4)
    cell = op.Range(0, 225, 1)
    cell_x = op.Unsqueeze(corner_x, last) + op.Mod(cell, 15)
    cell_y = op.Unsqueeze(corner_y, last) + cell / 15
    inside = op.And(op.And(cell_x < map_width, cell_y < map_height), op.Unsqueeze(taken, last))
    image = op.Reshape(
        op.Range(0, op.Squeeze(op.Shape(feature, start=0, end=1)), 1), op.Constant(value_ints=[-1, 1, 1])
    )
    row = (image * map_height + op.Min(cell_y, map_height - 1)) * map_width + op.Min(cell_x, map_width - 1)
    rows = op.Flatten(op.Transpose(feature, perm=[0, 2, 3, 1]), axis=3)
    cells = op.Gather(rows, row, axis=0)
    patches = op.Where(op.Unsqueeze(inside, last), cells, op.CastLike(0.0, feature))
    return patches, corners, taken, candidate, overflow
