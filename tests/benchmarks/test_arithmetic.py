"""Multiply-adds of presets, against numbers of their authors and against a sum by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from asag.families import find_preset
from benchmarks.arithmetic import main, mean_of_dataset, multiply_adds
from tests.runtime.toy_detector import write_toy_dataset

PUBLISHED = {
    "asag-d-r50-3x-300": 182,
    "deformable-detr-r50": 172.9,
    "deformable-detr-swin-t": 180.4,
    "efficient-detr-r50": 177.3,
    "efficient-detr-swin-t": 184.8,
    **dict(zip((f"sparse-detr-r50-{kept}0" for kept in range(1, 6)), (105.4, 112.9, 120.5, 128.0, 135.6), strict=True)),
    **dict(
        zip((f"sparse-detr-swin-t-{kept}0" for kept in range(1, 6)), (113.4, 121.0, 128.5, 136.1, 143.7), strict=True)
    ),
    "sap-detr-r50": 92,
    "sap-detr-dc5-r50": 197,
    "sap-detr-r101": 158,
    "sap-detr-dc5-r101": 266,
}
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


def test_the_command_prints_a_line_for_each_preset(tmp_path: Path) -> None:
    write_toy_dataset(tmp_path)
    done = CliRunner().invoke(main, ["--preset", "sap-detr-tiny", "--data", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "sap-detr-tiny: " in done.output
