"""A detector and a dataset so small that the loop runs in seconds."""

from __future__ import annotations

import pytest

from asag import families
from asag.train.config import TrainConfig
from asag.train.synthetic import write_synthetic_dataset
from tests.train.child_run import FROZEN, MICRO, micro_families


@pytest.fixture
def micro_preset(monkeypatch):
    """A registered preset with a tiny network on 96-pixel images; gives its name."""
    monkeypatch.setattr(families, "FAMILIES", micro_families())
    return MICRO


@pytest.fixture
def frozen_preset(micro_preset):
    """The same, with norms that stay as they are: what an image gives then does not depend on the others."""
    return FROZEN


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A synthetic dataset of ten small images."""
    root = tmp_path_factory.mktemp("shapes") / "data"
    return write_synthetic_dataset(root, train_images=7, val_images=3, image_size=96, seed=2)


@pytest.fixture
def config(micro_preset, shapes, tmp_path):
    """A run of six steps, of two epochs, without evaluation."""
    return TrainConfig(
        preset=micro_preset,
        data=shapes,
        output=tmp_path / "run",
        steps=6,
        batch_size=2,
        learning_rate=1e-3,
        backbone_learning_rate=1e-3,
        gradient_clip=5.0,
        warmup_steps=2,
        milestones=(1,),
        workers=0,
        device="cpu",
        log_interval=2,
        checkpoint_interval=2,
        evaluation_interval=0,
    )
