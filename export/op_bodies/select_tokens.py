"""Body of `SelectTokens`; the definition is `asag.ops.select_tokens`."""

import numpy as np
from onnx import TensorProto, numpy_helper
from onnxscript import BOOL, FLOAT, INT64, graph, script

from asag.export.op_bodies.domain import asag_opset, op

# What a float32 is for each of its exponents, without mantissa: 0 for what has no implied bit, infinity for the last.
EXPONENTS = numpy_helper.from_array((np.arange(256, dtype=np.uint32) << 23).view(np.float32), "float32_by_exponent")
BITS = numpy_helper.from_array(2 ** np.arange(31, -1, -1, dtype=np.int64), "bits_from_the_highest")


@script(asag_opset, default_opset=op)
def SelectTokens(scores, counts, capacity: int):  # noqa: N802
    """The cut is found by bisection over the bits of float32, which takes 32 counts whatever the scores are; TensorRT's
    TopK ends at 3840.

    A cut is a whole number: the bits of a positive float and, below 2^31, those of a negative one backwards.
    """
    axis = op.Constant(value_ints=[1])
    limit = op.Constant(value_int=capacity)
    wanted = op.Unsqueeze(op.Min(op.Cast(counts, to=TensorProto.INT64), limit), axis)
    ordered = op.Where(op.IsNaN(scores), op.Constant(value_float=float("-inf")), scores)
    ordered = op.Where(op.Abs(ordered) < 1.1754943508222875e-38, 0.0, ordered)
    float_of = op.Constant(value=EXPONENTS)
    bits = op.Constant(value=BITS)

    @graph()
    def try_bit(step: INT64, going: BOOL, cut: INT64["B", 1], threshold: FLOAT["B", 1]):  # noqa: F821 (names of axes)
        """Set a bit where enough scores reach what the cut then is. Only the trip count ends the loop."""
        trial = cut + op.Gather(bits, step, axis=0)
        pattern = op.Abs(trial - 2147483648)
        exponent = pattern / 8388608
        mantissa = op.Cast(pattern - exponent * 8388608, to=TensorProto.FLOAT) / 8388608.0
        size = op.Gather(float_of, exponent, axis=0) * (1.0 + mantissa)
        reached = op.Where(trial < 2147483648, op.Neg(size), size)
        count = op.ReduceSum(op.Cast(ordered >= reached, to=TensorProto.INT64), axis, keepdims=1)
        enough = count >= wanted
        return op.Identity(going), op.Where(enough, trial, cut), op.Where(enough, reached, threshold)

    true = op.Cast(op.Constant(value_int=1), to=TensorProto.BOOL)
    _, threshold = op.Loop(32, true, wanted * 0, op.Cast(wanted, to=TensorProto.FLOAT), body=try_bit)

    above = ordered > threshold
    equal = op.Equal(ordered, threshold)
    room = wanted - op.ReduceSum(op.Cast(above, to=TensorProto.INT64), axis, keepdims=1)
    equals = op.Cast(equal, to=TensorProto.INT64)
    # Of equals at the cut only the first ones are chosen.
    chosen = op.Or(above, op.And(equal, op.CumSum(equals, op.Constant(value_int=1)) <= room))
    flag = op.Cast(chosen, to=TensorProto.INT64)
    rank = op.CumSum(flag, op.Constant(value_int=1), exclusive=1)
    token = op.Range(0, op.Squeeze(op.Shape(scores, start=1, end=2)), 1)
    place = op.Where(chosen, rank, op.Max(wanted, 0) + token - rank)
    every = op.Expand(token, op.Shape(scores))
    indices = op.ScatterElements(every, place, every, axis=1)
    indices = op.Slice(indices, [0], op.Reshape(limit, axis), axis)
    active = op.Range(0, limit, 1) < wanted
    return indices, active
