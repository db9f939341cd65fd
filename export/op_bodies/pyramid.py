"""What the two pyramid ops share: P2..P5 as one list of cells, so that a sample is one gathered row of channels."""

from onnxscript import script

from asag.export.op_bodies.domain import asag_opset, op


@script(asag_opset, default_opset=op)
def FlattenPyramid(p2, p3, p4, p5):  # noqa: N802
    """[B, C, H, W] x 4 -> cells [B, S, C], and of each level: height [4], width [4] and first cell [4], int64."""
    cells = op.Concat(
        op.Transpose(op.Reshape(p2, op.Constant(value_ints=[0, 0, -1])), perm=[0, 2, 1]),
        op.Transpose(op.Reshape(p3, op.Constant(value_ints=[0, 0, -1])), perm=[0, 2, 1]),
        op.Transpose(op.Reshape(p4, op.Constant(value_ints=[0, 0, -1])), perm=[0, 2, 1]),
        op.Transpose(op.Reshape(p5, op.Constant(value_ints=[0, 0, -1])), perm=[0, 2, 1]),
        axis=1,
    )
    height = op.Concat(
        op.Shape(p2, start=2, end=3),
        op.Shape(p3, start=2, end=3),
        op.Shape(p4, start=2, end=3),
        op.Shape(p5, start=2, end=3),
        axis=0,
    )
    width = op.Concat(
        op.Shape(p2, start=3, end=4),
        op.Shape(p3, start=3, end=4),
        op.Shape(p4, start=3, end=4),
        op.Shape(p5, start=3, end=4),
        axis=0,
    )
    first = op.CumSum(height * width, op.Constant(value_int=0), exclusive=1)
    return cells, height, width, first
