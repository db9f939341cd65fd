"""A detector and a dataset so small that the loop runs in seconds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from asag import presets
from train.synthetic import write_synthetic_dataset

MICRO = "micro"


@pytest.fixture
def micro_preset(monkeypatch):
    """A registered preset with a tiny network on 96-pixel images; gives its name."""
    tiny = presets.PRESETS["asag-a-tiny"]
    size = dataclasses.replace(tiny.config.size, backbone_width=8, anchor_hidden=32, feed_forward=32)
    micro = dataclasses.replace(
        tiny,
        config=dataclasses.replace(tiny.config, size=size),
        shorter_side=96,
        longer_side=96,
        input_size=(96, 96),
    )
    monkeypatch.setitem(presets.PRESETS, MICRO, micro)
    return MICRO


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A synthetic dataset of ten small images."""
    root = tmp_path_factory.mktemp("shapes") / "data"
    return write_synthetic_dataset(root, train_images=7, val_images=3, image_size=96, seed=2)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Several test processes on a few cores would spend their time waiting for one another's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
