"""An exported graph holds no more than the network asks for: each layer once, and a loop only where one is needed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx.inliner
import pytest
from torch import nn

from asag.deploy import DeployedDetector
from export.model import export_onnx
from tests.builders import random_detector, small_config, small_info


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["adamixer", "sparse_rcnn"])
def test_nodes_are_those_of_the_layers(decoder: str, tmp_path: Path) -> None:
    deployed = DeployedDetector(random_detector(small_config(decoder=decoder)), small_info())
    export_onnx(deployed, tmp_path / "model.onnx")
    inlined = onnx.inliner.inline_local_functions(onnx.load(tmp_path / "model.onnx"))
    types = Counter(node.op_type for node in inlined.graph.node)
    assert types["Conv"] == sum(isinstance(module, nn.Conv2d) for module in deployed.modules())
    assert types["BatchNormalization"] == 0, "norms fold into the convolutions"
    probed_levels = 2
    assert types["Loop"] == probed_levels, "only the suppression of each probed level is one"
