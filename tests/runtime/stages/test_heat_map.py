"""Heat maps: where they are warm, how far that reaches, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from asag.runtime.stages.heat_map import draw_heat_map, heat_of


def test_a_gaussian_falls_along_both_axes_by_its_deviations() -> None:
    heat = heat_of(np.array([[20.5, 10.5, 0.1, -0.5]]), 60, 40)
    assert heat.shape == (40, 60)
    assert np.unravel_index(heat.argmax(), heat.shape) == (10, 20)
    assert heat[10, 30] == pytest.approx(np.exp(-0.5))
    assert heat[12, 20] == pytest.approx(np.exp(-0.5))


def test_heads_add_up_and_what_is_no_number_is_left_out() -> None:
    heads = np.array([[10.5, 5.5, 1.0, 1.0], [10.5, 5.5, 1.0, 1.0], [30.5, 5.5, 1.0, 1.0], [np.nan, 0, 1, 1]])
    heat = heat_of(heads, 40, 10)
    assert heat[5, 10] == 1
    assert heat[5, 30] == pytest.approx(0.5)
    assert not heat_of(heads[3:], 40, 10).any()
    assert not heat_of(np.array([[1e9, 0.0, 1.0, 1.0]]), 40, 10).any()


def test_the_picture_is_warm_where_it_is_looked_at_and_dark_elsewhere() -> None:
    grey = Image.new("RGB", (40, 20), (100, 100, 100))
    pixels = np.asarray(draw_heat_map(grey, np.array([[10.5, 10.5, 0.3, 0.3]]))).astype(int)
    assert pixels[10, 10].tolist() == [202] * 3
    red, green, blue = pixels[10, 14]
    assert red > green > blue
    assert pixels[10, 39].max() <= 45
    assert (np.asarray(grey) == 100).all(), "the picture that is given stays as it is"
