"""AdaMixer against numbers of the published implementation, case by case and section by section."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from asag.checkpoint import CheckpointInfo
from asag.datasets import COCO_CATEGORIES
from asag.deploy import DeployedDetector
from asag.family import InputSpec
from asag.runtime.metadata import ModelMetadata
from asag.runtime.parity.agreement import compare_detections
from asag.runtime.postprocessing import OUTPUT_NAMES, Detections, postprocess
from tests.families.adamixer.golden_cases import FOLDER, all_values, golden_batch, golden_detector, read_case

CASES = sorted(path.stem for path in FOLDER.glob("adamixer_*.npz"))

LOGIT_TOLERANCE = 1e-4
BOX_TOLERANCE = 3e-3
"""Pixels."""
VALUE_TOLERANCE = 3e-4
"""Of maps and queries, whose values are of the order of one: twice the noise of the reference."""


def tolerance_of(name: str) -> float:
    if name.endswith("_logits"):
        return LOGIT_TOLERANCE
    return BOX_TOLERANCE if name.endswith(("_boxes", "_xyzr", "_points")) else VALUE_TOLERANCE


def section(found: Mapping[str, NDArray], name: str, last: int) -> NDArray:
    """A value as the case has it, most of them in samples."""
    base, _, part = name.rpartition("_")
    if part in ("sample", "mean", "std"):
        value = found[base]
        channels, height, width = value.shape[1:]
        sample = value[:, :: channels // 4, :: -(-height // 6), :: -(-width // 6)]
        return {"sample": sample, "mean": value.mean(axis=(1, 2, 3)), "std": value.std(axis=(1, 2, 3))}[part]
    value = found[name]
    if name == "initial_content":
        value = value[0, ::20]
    elif name == "stage0_sampled":
        value = value[:, ::20, :, ::8, ::16]
    elif part in ("content", "attention", "points", "mixed"):
        value = value[:, ::20]
    elif part == "logits" and base != f"stage{last}":
        value = value[..., ::10]
    return value


@pytest.mark.parametrize("case", CASES or ["none"])
def test_every_section(goldens: Path, case: str) -> None:
    expected, meta = read_case(case)
    images, sizes = golden_batch(meta)
    detector = golden_detector(meta)
    found = {name: value.numpy() for name, value in all_values(detector, images, sizes).items()}
    compared = [name for name in expected if not name.startswith("image")]
    assert len(compared) == 24 + 2 + 4 + 4 * meta["options"]["stages"]
    for name in compared:
        value = section(found, name, meta["options"]["stages"] - 1)
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=tolerance_of(name), err_msg=name)


@pytest.mark.parametrize("case", CASES or ["none"])
def test_deployed_detections(goldens: Path, case: str) -> None:
    """The model as it is exported (folded norms, one class branch) gives the reference's detections."""
    expected, meta = read_case(case)
    images, sizes = golden_batch(meta)
    size = (images.shape[2], images.shape[3])
    info = CheckpointInfo(
        "golden", tuple(COCO_CATEGORIES), tuple(COCO_CATEGORIES.values()), InputSpec(min(size), max(size), size)
    )
    deployed = DeployedDetector(golden_detector(meta), info, input_type="float32")
    with torch.no_grad():
        outputs = dict(zip(OUTPUT_NAMES, (value.numpy() for value in deployed(images, sizes)), strict=True))
    contents = [(int(height), int(width)) for height, width in sizes]
    ids = np.array(tuple(COCO_CATEGORIES))
    for image, ours in enumerate(postprocess(outputs, contents, ModelMetadata(**deployed.describe()))):
        boxes, scores, labels = (expected[f"image{image}_{name}"] for name in ("boxes", "scores", "labels"))
        reference = Detections(boxes, scores, ids[labels], 0, contents[image])
        assert len(ours) == len(reference) == meta["options"]["queries"]
        pairs = compare_detections(
            image, reference, ours, len(reference), score_tolerance=2e-5, box_tolerance=2 * BOX_TOLERANCE
        )
        assert pairs.within()


def test_all_variants_are_covered(goldens: Path) -> None:
    names = " ".join(CASES)
    for part in ("r50_100 ", "r101_300 ", "_batch", "_spread"):
        assert part in f"{names} "
