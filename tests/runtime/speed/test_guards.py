"""Quantities that must not grow unnoticed: a larger graph or engine is slower on every machine, however fast it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from asag.deploy import DeployedDetector
from export.model import export_onnx
from runtime.engines.backend import TENSORRT_RTX
from runtime.engines.build import build_engine
from runtime.errors import BackendUnavailableError
from tests.asag.test_graph_capture import watch
from tests.builders import random_detector, small_config, small_info

# A few nodes above what was measured; lower them when a change makes the graph smaller.
MOST_NODES = {"adamixer": 590, "sparse_rcnn": 545}
MOST_NODES_INLINED = {"adamixer": 1420, "sparse_rcnn": 1380}
LEFT_BY_OLDER_EXPORTERS = 20 if TorchVersion(torch.__version__) < "2.14" else 0
"""Nodes that the exporter of an older PyTorch does not simplify away."""
MOST_CONVOLUTIONS = 27
MOST_LOOPS = 2
MOST_NETWORK_LAYERS = 4600
MOST_LAUNCHING_OPERATIONS = {"adamixer": 380, "sparse_rcnn": 343}
KERNELS_PER_OPERATION = 2
"""On average at most: sorting and some reductions take several."""


@pytest.fixture(scope="module", params=["adamixer", "sparse_rcnn"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    decoder = request.param
    path = tmp_path_factory.mktemp("guards") / "model.onnx"
    export_onnx(DeployedDetector(random_detector(small_config(decoder=decoder)), small_info()), path)
    return decoder, path


def test_nodes_of_the_graph(exported: tuple[str, Path]) -> None:
    import onnx.inliner

    decoder, path = exported
    model = onnx.load(path)
    assert len(model.graph.node) <= MOST_NODES[decoder] + LEFT_BY_OLDER_EXPORTERS
    inlined = onnx.inliner.inline_local_functions(model)
    assert len(inlined.graph.node) <= MOST_NODES_INLINED[decoder] + LEFT_BY_OLDER_EXPORTERS
    types = [node.op_type for node in inlined.graph.node]
    assert types.count("Conv") <= MOST_CONVOLUTIONS
    assert types.count("Loop") <= MOST_LOOPS, "only the suppression of each probed level is one"
    # Norms fold into the convolutions; the others have shapes that depend on the data.
    assert not {"BatchNormalization", "If", "Scan", "NonZero", "NonMaxSuppression"} & set(types)


def test_layers_that_the_engine_is_built_from(exported: tuple[str, Path], tmp_path: Path) -> None:
    decoder, path = exported
    if decoder != "adamixer":
        pytest.skip("one engine is enough; a build takes seconds")
    try:
        TENSORRT_RTX.load()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    result = build_engine(path, tmp_path / "model.engine")
    layers = sum(result.manifest.layers.values())  # before fusion; what the builder made of them, only a GPU tells
    assert 0 < layers <= MOST_NETWORK_LAYERS


def deployed_and_shapes(decoder: str) -> tuple[DeployedDetector, tuple[tuple[int, ...], torch.dtype]]:
    deployed = DeployedDetector(random_detector(small_config(decoder=decoder)), small_info())
    return deployed, ((1, 3, *deployed.input_size), torch.uint8)


@pytest.mark.parametrize("decoder", ["adamixer", "sparse_rcnn"])
def test_operations_that_start_kernels_for_an_image(decoder: str) -> None:
    """Eager PyTorch on a GPU starts at least one kernel for each; a custom op is one. Counted without a GPU."""
    deployed, images = deployed_and_shapes(decoder)
    _, seen = watch(deployed, images, ((1, 2), torch.float32))
    assert 100 < seen.launches <= MOST_LAUNCHING_OPERATIONS[decoder]


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["adamixer", "sparse_rcnn"])
def test_kernels_launched_for_an_image(decoder: str) -> None:
    deployed, (shape, _) = deployed_and_shapes(decoder)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    sizes = torch.tensor([shape[2:]], dtype=torch.float32, device="cuda")
    deployed.cuda()
    with torch.inference_mode():
        deployed(images, sizes)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            deployed(images, sizes)
            torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(kernels) <= KERNELS_PER_OPERATION * MOST_LAUNCHING_OPERATIONS[decoder]
