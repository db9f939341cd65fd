"""The ops' ONNX bodies in ONNX Runtime against the PyTorch definitions, on the inputs that the kernels are tried on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from kernel_cases import Array, mixing_inputs, probing_inputs, pyramid, roi_boxes, tensors

from asag.ops import (
    adaptive_probing_definition,
    gather_anchors_definition,
    pyramid_roi_align_definition,
    sampling_mixing_definition,
)
from trt_plugins.bench import op_model


def run_body(name: str, inputs: list[Array], attributes: dict[str, Any] | None = None) -> list[Array]:
    """The op as the only node of a model."""
    model = op_model(name, [array.shape for array in inputs], attributes or {})
    onnx.checker.check_model(onnx.ModelProto.FromString(model))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


@pytest.mark.parametrize("capacity", [1, 5, 40])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("cells", [(26, 25), (1, 1)])
def test_adaptive_probing(cells: tuple[int, int], coarse: bool, capacity: int) -> None:
    inputs = probing_inputs(4, count=120, cells=cells, coarse=coarse)
    inputs[0][:, ::5, 4] = np.nan
    actual = run_body("AdaptiveProbing", inputs, {"stride": 16, "capacity": capacity})
    expected = adaptive_probing_definition(*tensors(*inputs), 16, capacity)
    for name, one, other in zip(expected._fields, actual, expected, strict=True):
        np.testing.assert_array_equal(one, other.numpy(), err_msg=name)


@pytest.mark.parametrize(("fewest", "most"), [(5, 20), (40, 100), (40, 20)])
@pytest.mark.parametrize("threshold", [0.1, 0.6])
@pytest.mark.parametrize("coarse", [False, True])
def test_gather_anchors(coarse: bool, threshold: float, fewest: int, most: int) -> None:
    anchors, valid, _, _ = probing_inputs(4, count=160, coarse=coarse)
    anchors[:, ::5, 4] = np.nan
    attributes = {"first": 60, "keep_threshold": threshold, "fewest": fewest, "most": most}
    actual = run_body("GatherAnchors", [anchors, valid], attributes)
    expected = gather_anchors_definition(*tensors(anchors, valid), *attributes.values())  # type: ignore[arg-type]
    np.testing.assert_array_equal(actual[0], expected[0].numpy())
    np.testing.assert_array_equal(actual[1], expected[1].numpy())


@pytest.mark.parametrize("finest", [(40, 56), (3, 5), (1, 1)])
def test_pyramid_roi_align(finest: tuple[int, int]) -> None:
    random = np.random.default_rng(2)
    inputs = [*pyramid(random, 2, 8, finest), roi_boxes(random, 2, 20, 200)]
    expected = pyramid_roi_align_definition(*tensors(*inputs)).numpy()
    np.testing.assert_allclose(run_body("PyramidRoIAlign", inputs)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("finest", [(16, 24), (3, 5), (1, 1)])
def test_sampling_mixing(finest: tuple[int, int]) -> None:
    inputs = mixing_inputs(2, 2, 3, (4, 16, 16, 32), finest)
    expected = sampling_mixing_definition(*tensors(*inputs), 32).numpy()
    actual = run_body("SamplingMixing", inputs, {"mixed_points": 32})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
