"""Multiply-adds of presets, against numbers of their authors and against a sum by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from asag.families import find_preset
from benchmarks.arithmetic import main, mean_of_dataset, multiply_adds
from tests.runtime.toy_detector import write_toy_dataset

PUBLISHED = {"sap-detr-r50": 92, "sap-detr-dc5-r50": 197, "sap-detr-r101": 158, "sap-detr-dc5-r101": 266}
AVERAGE = (800, 1104)
"""0.883 million pixels, at which the one number of every preset fits those of the others. Most of COCO's photographs
become 800 x 1066, and the next many 800 x 1199.
"""


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_as_published(name: str) -> None:
    found = multiply_adds(find_preset(name), [AVERAGE])[AVERAGE]
    assert found / 1e9 == pytest.approx(PUBLISHED[name], rel=0.03)


def test_the_mean_is_that_of_the_resized_images() -> None:
    preset = find_preset("sap-detr-tiny")
    counts = multiply_adds(preset, [(240, 320), (320, 240)])
    expected = (2 * counts[240, 320] + counts[320, 240]) / 3
    assert mean_of_dataset(preset, [(480, 640), (120, 160), (640, 480)]) == pytest.approx(expected)


def test_what_is_not_counted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adamixer-tiny has asag\.sampling_mixing"):
        multiply_adds(find_preset("adamixer-tiny"), [(64, 64)])


def test_the_command_prints_a_line_for_each_preset(tmp_path: Path) -> None:
    write_toy_dataset(tmp_path)
    done = CliRunner().invoke(main, ["--preset", "sap-detr-tiny", "--data", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "sap-detr-tiny: " in done.output
