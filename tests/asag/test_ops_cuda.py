"""The CUDA kernels behind the PyTorch ops."""

from __future__ import annotations

import pytest
import torch

from asag.deploy import DeployedDetector
from asag.ops.cuda import register_cuda_kernels
from tests.builders import random_detector, random_picture, small_info, uint8_batch


@pytest.mark.gpu
def test_the_detector_gives_the_same_detections_with_kernels() -> None:
    deployed = DeployedDetector(random_detector(), small_info((160, 192)))
    images, sizes = uint8_batch([random_picture(seed, 150, 180) for seed in range(3)], 160, 192)
    expected = deployed(images, sizes)
    register_cuda_kernels()
    found = deployed.cuda()(images.cuda(), sizes.cuda())
    torch.testing.assert_close(found[1].cpu(), expected[1], atol=1e-4, rtol=0)
    assert torch.equal(found[3].cpu(), expected[3])


@pytest.mark.gpu
def test_a_cuda_graph_holds_the_whole_model() -> None:
    register_cuda_kernels()
    deployed = DeployedDetector(random_detector(), small_info((160, 192))).cuda()
    images, sizes = (tensor.cuda() for tensor in uint8_batch([random_picture(0, 150, 180)], 160, 192))
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        expected = [tensor.clone() for tensor in deployed(images, sizes)]
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = deployed(images, sizes)
        graph.replay()
        stream.synchronize()
    for output, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, reference)
