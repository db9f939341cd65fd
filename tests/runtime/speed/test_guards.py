"""An exported graph holds no more than the network asks for: each layer once, and a loop only where one is needed."""

from __future__ import annotations

from collections import Counter

import onnx.inliner
import pytest
from torch import nn

from tests.exports import small_export


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["adamixer", "sparse_rcnn"])
def test_nodes_are_those_of_the_layers(decoder: str) -> None:
    exported = small_export(decoder)
    inlined = onnx.inliner.inline_local_functions(exported.proto)
    types = Counter(node.op_type for node in inlined.graph.node)
    assert types["Conv"] == sum(isinstance(module, nn.Conv2d) for module in exported.deployed.modules())
    assert types["BatchNormalization"] == 0, "norms fold into the convolutions"
    probed_levels = 2
    assert types["Loop"] == probed_levels, "only the suppression of each probed level is one"
