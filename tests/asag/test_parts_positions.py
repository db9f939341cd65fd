"""Where content lies on padded maps, and embeddings of places, against plain Python."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from asag.parts.levels import Levels
from asag.parts.positions import content_cells, map_embedding, sine_embedding


@given(st.integers(1, 300), st.data())
def test_content_follows_the_nearest_pixel(side: int, data: st.DataObject) -> None:
    """As PyTorch resizes a mask of the padding."""
    cells = data.draw(st.integers(1, side))
    content = data.draw(st.integers(1, side))
    mask = (torch.arange(side) < content).float().reshape(1, 1, side, 1)
    expected = torch.nn.functional.interpolate(mask, size=(cells, 1)).flatten().bool()
    rows, columns = content_cells(torch.tensor([[float(content), 1.0]]), (side, 1), (cells, 1))
    assert torch.equal(rows[0], expected)
    assert columns.all()
    assert rows[0, 0]


def test_sines_of_one_angle() -> None:
    found = sine_embedding(torch.tensor(0.7), 6)
    expected = []
    for pair in range(3):
        angle = 0.7 / 10000 ** (2 * pair / 6)
        expected += [math.sin(angle), math.cos(angle)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_cell_s_embedding_is_of_its_centre() -> None:
    """Row 1 of 3 with content, column 0 of 2; what lies beyond has the last one's place."""
    rows = torch.tensor([[True, True, True, False]])
    columns = torch.tensor([[True, True]])
    found = map_embedding(rows, columns, 8)
    assert found.shape == (1, 4, 2, 8)
    expected = torch.cat((sine_embedding(torch.tensor(math.pi), 4), sine_embedding(torch.tensor(math.pi / 2), 4)))
    torch.testing.assert_close(found[0, 1, 0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0, 3], found[0, 2])


def test_levels_of_two_images() -> None:
    """An input of 32 x 64 pixels, contents 32 x 64 and 20 x 33, on maps of strides 8 and 16."""
    levels = Levels.of(((4, 8), (2, 4)), torch.tensor([[32.0, 64.0], [20.0, 33.0]]), (32, 64))
    assert levels.cells.tolist() == [[8, 4], [4, 2]]
    assert levels.ratios.tolist() == [[[1, 1], [1, 1]], [[5 / 8, 3 / 4], [3 / 4, 1]]]
    assert not levels.padded[0].any()
    assert levels.padded[1, :32].reshape(4, 8).logical_not().nonzero().amax(0).tolist() == [2, 4]
    torch.testing.assert_close(levels.centres[1, 0], torch.tensor([0.5 / 5, 0.5 / 3]))
    torch.testing.assert_close(levels.centres[1, 32 + 4 + 1], torch.tensor([1.5 / 3, 1.5 / 2]))
    points = torch.tensor([[[0.5, 1.0]]]).expand(2, -1, -1)
    assert levels.on_maps(points)[1, 0].tolist() == [[0.5 * 5 / 8, 3 / 4], [0.5 * 3 / 4, 1]]
    boxes = levels.on_maps(points.repeat(1, 1, 2))
    assert torch.equal(boxes[..., :2], boxes[..., 2:])
    tokens = torch.arange(2.0 * 40 * 3).reshape(2, 40, 3)
    assert torch.equal(levels.flat(levels.maps(tokens)), tokens)
