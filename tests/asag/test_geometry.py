"""Box arithmetic against plain formulas and against torchvision."""

from __future__ import annotations

import math

import pytest
import torch
from asag.geometry import (
    content_scale,
    cxcywh_to_xyxy,
    decode_xyzr,
    encode_xyzr,
    intersection_over_foreground,
    position_embedding,
    refine_xyzr,
    xyxy_to_cxcywh,
)
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_convert

coordinate = st.floats(-2000, 2000, width=32)
side = st.floats(0.5, 2000, width=32)
box = st.tuples(coordinate, coordinate, side, side)
boxes = st.lists(box, min_size=1, max_size=6).map(torch.tensor)


@given(boxes)
def test_conversions_equal_torchvision(values: torch.Tensor) -> None:
    corners = cxcywh_to_xyxy(values)
    torch.testing.assert_close(corners, box_convert(values, "cxcywh", "xyxy"), rtol=0, atol=1e-3)
    torch.testing.assert_close(xyxy_to_cxcywh(corners), values, rtol=0, atol=1e-3)


@given(st.tuples(coordinate, coordinate, st.floats(3, 300, width=32), st.floats(3, 300, width=32)).map(torch.tensor))
def test_xyzr_round_trip(values: torch.Tensor) -> None:
    """For shapes as anchors have; the 1e-7 of the encoding shows at aspect ratios past a thousand."""
    decoded = decode_xyzr(encode_xyzr(values)) * 4
    torch.testing.assert_close(decoded, values, rtol=1e-4, atol=1e-3)


@given(box)
def test_xyzr_formula(values: tuple[float, float, float, float]) -> None:
    x, y, width, height = (value / 4 for value in values)
    expected = (
        x,
        y,
        math.log2(width * height + 1e-7) / 2,
        math.log2(height / (width + 1e-7) + 1e-7) / 2,
    )
    torch.testing.assert_close(encode_xyzr(torch.tensor(values)), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_known_xyzr() -> None:
    """A box of 64 x 16 pixels is 16 x 4 units: scale 2^3, and half the logarithm of 4/16."""
    torch.testing.assert_close(
        encode_xyzr(torch.tensor([40.0, 20.0, 64.0, 16.0])), torch.tensor([10.0, 5.0, 3.0, -1.0])
    )
    assert decode_xyzr(torch.tensor([10.0, 5.0, 3.0, -1.0])).tolist() == [10.0, 5.0, 16.0, 4.0]


def test_empty_box_stays_finite() -> None:
    """A padding query is a box of zeros: its encoding must be a number, or attention would spread a NaN."""
    assert encode_xyzr(torch.zeros(4)).isfinite().all()
    assert decode_xyzr(encode_xyzr(torch.zeros(4))).isfinite().all()


@given(box, st.tuples(*[st.floats(-2, 2, width=32)] * 4))
def test_refinement_scales_with_the_box(values: tuple[float, ...], deltas: tuple[float, ...]) -> None:
    x, y, z, r = encode_xyzr(torch.tensor(values, dtype=torch.float64)).tolist()
    found = refine_xyzr(torch.tensor([x, y, z, r], dtype=torch.float64), torch.tensor(deltas, dtype=torch.float64))
    expected = (x + deltas[0] * 2**z, y + deltas[1] * 2**z, z + deltas[2], r + deltas[3])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_content_scale_is_width_first() -> None:
    assert content_scale(torch.tensor([[480.0, 640.0], [10.0, 20.0]])).tolist() == [
        [[640.0, 480.0, 640.0, 480.0]],
        [[20.0, 10.0, 20.0, 10.0]],
    ]


@given(boxes)
def test_intersection_over_foreground(values: torch.Tensor) -> None:
    corners = cxcywh_to_xyxy(values)
    found = intersection_over_foreground(corners.unsqueeze(0))[0]
    for i, one in enumerate(corners.tolist()):
        for j, other in enumerate(corners.tolist()):
            width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
            height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
            area = (one[2] - one[0]) * (one[3] - one[1])
            assert float(found[i, j]) == pytest.approx(width * height / max(area, 1e-6), rel=1e-4, abs=1e-5)


def test_a_box_without_area_covers_at_most_a_millionth() -> None:
    """Its area counts as 1e-6, so the share stays a number and not infinite."""
    corners = torch.tensor([[[5.0, 5.0, 5.0, 9.0], [0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 5.0005, 5.001]]])
    found = intersection_over_foreground(corners)[0]
    assert found[0].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(found[2, 1], torch.tensor(0.5), rtol=1e-2, atol=0)


def test_position_embedding_formula() -> None:
    xyzr = (137.0, -20.5, 3.25, -0.5)
    channels = 64
    quarter = channels // 4
    expected = []
    for value, scale in zip(xyzr, (1e-3, 1e-3, 1.0, 1.0), strict=True):
        for index in range(quarter):
            phase = value * scale / 10000 ** (2 * (index // 2) / quarter)
            expected.append(math.cos(phase) if index % 2 else math.sin(phase))
    found = position_embedding(torch.tensor([xyzr]), channels)
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=0, atol=1e-6)
