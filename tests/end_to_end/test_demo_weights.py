"""The weights that come with the repository: accurate, probing, and the same in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asag.checkpoint import load_detector
from asag.deploy import DeployedDetector
from asag.export.model import export_onnx
from asag.runtime.coco_dataset import CocoFolder, open_coco
from asag.runtime.opening import open_session
from asag.runtime.parity.comparison import ParityReport, compare
from asag.runtime.preprocessing import prepare
from asag.train.synthetic import write_synthetic_dataset

pytestmark = pytest.mark.slow

WEIGHTS = Path(__file__).parents[2] / "checkpoints" / "asag-a-tiny.safetensors"
IMAGES = 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoFolder:
    """Images that the weights were not trained on: those of another seed."""
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    return open_coco(write_synthetic_dataset(folder, train_images=1, val_images=IMAGES, image_size=320, seed=1))


@pytest.fixture(scope="module")
def parity(dataset: CocoFolder, tmp_path_factory: pytest.TempPathFactory) -> ParityReport:
    model = tmp_path_factory.mktemp("model") / "model.onnx"
    export_onnx(DeployedDetector(*load_detector(WEIGHTS)), model)
    with open_session(WEIGHTS, threads=1) as reference, open_session(model, threads=1) as candidate:
        return compare(reference, [candidate], dataset)


def test_the_file_is_small_enough() -> None:
    assert WEIGHTS.stat().st_size <= 20e6


def test_average_precision(parity: ParityReport) -> None:
    reference, candidate = (row.result for row in parity.rows)
    assert reference is not None
    assert candidate is not None
    assert reference.ap >= 0.40
    assert round(reference.ap, 3) == round(candidate.ap, 3)


def test_every_image_has_the_same_detections(parity: ParityReport) -> None:
    agreement = parity.rows[1].agreement
    assert agreement is not None
    assert agreement.images_within == agreement.images == IMAGES
    assert agreement.unmatched == 0
    assert agreement.score_difference < 1e-4
    assert agreement.box_difference < 0.05


def test_most_images_are_probed_on_p4_and_p3(dataset: CocoFolder) -> None:
    probed = []
    with open_session(WEIGHTS, threads=1) as session:
        for image_id in dataset.image_ids:
            values = session.stage_values(prepare([dataset.load(image_id)], session.metadata))
            probed.append([bool(values[f"{level}_patches/valid"].any()) for level in ("P4", "P3")])
    assert (np.mean(probed, axis=0) > 0.5).all()
