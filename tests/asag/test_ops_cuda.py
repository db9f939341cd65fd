"""The CUDA kernels behind the PyTorch ops. Without a GPU, the choice between kernel and definition on CPU tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import asag.ops.cuda
from asag.deploy import DeployedDetector
from asag.ops import (
    definitions_only,
    deformable_attention_definition,
    gather_anchors_definition,
    sampling_mixing_definition,
)
from asag.ops.cuda import KernelOp
from asag.trt_plugins.launch import DeviceArray, prepare_call
from asag.trt_plugins.operations import OPERATIONS
from asag.trt_plugins.plan import Plan, make_plan
from tests.builders import random_detector, random_picture, small_info, uint8_batch
from tests.ptx_machine.launch import launch_ptx
from tests.trt_plugins.kernel_cases import LEVELS, attention_inputs, tensors

pytestmark = pytest.mark.usefixtures("played_device")

ATTRIBUTES = (4, 0.1, 2, 6)
"""first, keep_threshold, fewest and most."""


class PlayedLaunch:
    """In place of a kernel of GatherAnchors: the definition, `error` added to the boxes or raised."""

    def __init__(self, error: float | ValueError = 0.0) -> None:
        self.error, self.launches = error, 0

    def __call__(
        self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], attributes: Mapping[str, Any]
    ) -> None:
        self.launches += 1
        if isinstance(self.error, ValueError):
            raise self.error
        boxes, valid = gather_anchors_definition(*inputs, *attributes.values())  # type: ignore[arg-type]
        outputs[0].copy_(boxes + self.error)
        outputs[1].copy_(valid)


class CountedDefinition:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return gather_anchors_definition(*arguments)


@pytest.fixture
def played_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU count as being on a GPU with tensor cores; tests that have a GPU ask it."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(asag.ops.cuda, "_has_tensor_cores", lambda device: True)


def gather_inputs(count: int = 12) -> tuple[Tensor, Tensor]:
    anchors = torch.rand((2, count, 5), generator=torch.Generator().manual_seed(0))
    return anchors * torch.tensor([100, 100, 30, 30, 1.0]), torch.ones((2, count), dtype=torch.bool)


def calls(
    monkeypatch: pytest.MonkeyPatch, error: float | ValueError, times: int = 3
) -> tuple[PlayedLaunch, CountedDefinition]:
    launch, definition = PlayedLaunch(error), CountedDefinition()
    monkeypatch.setattr(asag.ops.cuda, "_launch", launch)
    op, inputs = KernelOp(OPERATIONS["GatherAnchors"], definition), gather_inputs()
    expected = gather_anchors_definition(*inputs, *ATTRIBUTES)
    for _ in range(times):
        for found, wanted in zip(op(*inputs, *ATTRIBUTES), expected, strict=True):
            assert torch.equal(found, wanted)
    return launch, definition


def test_a_kernel_that_agrees_once_serves_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch, definition = calls(monkeypatch, 0.0)
    assert (launch.launches, definition.calls) == (3, 1)


@pytest.mark.parametrize(
    ("error", "message"),
    [(5.0, "its kernel is off by 5"), (float("nan"), "off by nan"), (ValueError("CUDA refused"), "CUDA refused")],
)
def test_a_kernel_that_does_not_is_left_with_one_warning(
    error: float | ValueError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(
        UserWarning, match=f"GatherAnchors runs as its PyTorch definition for float32: .*{message}"
    ) as told:
        launch, definition = calls(monkeypatch, error)
    assert (launch.launches, definition.calls, len(told)) == (1, 3, 1)


def test_what_is_no_number_in_both_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = PlayedLaunch()
    monkeypatch.setattr(asag.ops.cuda, "_launch", launch)
    op, (anchors, selectable) = KernelOp(OPERATIONS["GatherAnchors"], gather_anchors_definition), gather_inputs()
    anchors[..., 0] = torch.nan
    anchors[..., 1] = torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            op(anchors, selectable, *ATTRIBUTES)
    assert launch.launches == 2


def test_every_compiled_kernel_is_tried_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, definition = PlayedLaunch(), CountedDefinition()
    monkeypatch.setattr(asag.ops.cuda, "_launch", launch)
    op = KernelOp(OPERATIONS["GatherAnchors"], definition)
    for count in (12, 12, 20):
        op(*gather_inputs(count), *ATTRIBUTES)
    op(*(tensor[:1] for tensor in gather_inputs(20)), *ATTRIBUTES)  # another batch size, the same machine code
    assert (launch.launches, definition.calls) == (4, 2)


def test_sizes_without_a_kernel_run_as_the_definition_in_the_type_of_the_maps() -> None:
    maps = [torch.rand((1, 4, 8 >> level, 8 >> level)).half() for level in range(4)]  # one channel per group
    points, parameters = torch.rand((1, 2, 4, 8, 3)), torch.rand((1, 2, 4 * (1 + 8 * 8))).half()
    op = KernelOp(OPERATIONS["SamplingMixing"], sampling_mixing_definition)
    found = op(*maps, points, parameters, mixed_points=8)
    wide = sampling_mixing_definition(*(map_.float() for map_ in maps), points, parameters.float(), 8)
    assert isinstance(found, Tensor)
    assert torch.equal(found, wide.half())


def test_lists_of_attributes_and_places_beside_16_bit_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch's dispatcher gives them: the levels are lists, and the locations are not of the value's type."""

    def launch(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], attributes: Mapping[str, Any]) -> None:
        arrays = [[DeviceArray.of_tensor(each) for each in given] for given in (inputs, outputs)]
        launch_ptx(name, *arrays, attributes)

    monkeypatch.setattr(asag.ops.cuda, "_launch", launch)
    value, locations, weights = tensors(*attention_inputs())
    op = KernelOp(OPERATIONS["MultiScaleDeformableAttention"], deformable_attention_definition)
    levels = [list(values) for values in LEVELS.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, found = (op(value.half(), locations, weights.half(), *levels) for _ in range(2))
    assert isinstance(found, Tensor)
    assert (found.dtype, list(op._serves.values())) == (torch.float16, [True])
    torch.testing.assert_close(found, expected)


def test_definitions_only_leaves_the_kernels_aside_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = PlayedLaunch()
    monkeypatch.setattr(asag.ops.cuda, "_launch", launch)
    op = KernelOp(OPERATIONS["GatherAnchors"], gather_anchors_definition)
    with definitions_only():
        op(*gather_inputs(), *ATTRIBUTES)
    assert launch.launches == 0
    op(*gather_inputs(), *ATTRIBUTES)
    assert launch.launches == 1


@pytest.mark.parametrize(("points", "mixed_points"), [(64, 128), (48, 128), (32, 192), (64, 64)])
def test_sizes_that_only_tensor_cores_serve_run_as_kernels(
    points: int, mixed_points: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain kernel of these sizes does not fit the shared memory of a block, that of the tensor cores does."""
    with pytest.raises(ValueError, match="does not fit"):
        make_plan("SamplingMixing", mixing_shapes(points, mixed_points), {"mixed_points": mixed_points}, "float16")
    launched: list[Plan] = []

    def launch(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], attributes: Mapping[str, Any]) -> None:
        arrays = [[DeviceArray.of_tensor(tensor) for tensor in tensors] for tensors in (inputs, outputs)]
        launched.append(prepare_call(name, *arrays, attributes, tensor_cores=True).plan)
        wide = [tensor.float() for tensor in inputs]
        outputs[0].copy_(sampling_mixing_definition(*wide, **attributes))

    monkeypatch.setattr(asag.ops.cuda, "_launch", launch)
    random = torch.Generator().manual_seed(0)
    *maps, place, parameters = (torch.rand(shape, generator=random) for shape in mixing_shapes(points, mixed_points))
    op = KernelOp(OPERATIONS["SamplingMixing"], sampling_mixing_definition)
    for _ in range(2):
        op(*(map_.half() for map_ in maps), 8 * place, parameters.half(), mixed_points=mixed_points)
    assert [dict(plan.defines)["TENSOR_CORES"] for plan in launched] == ["1", "1"]
    # What was found of a kernel is remembered under the kernel that ran.
    assert op._serves == {(torch.device("cpu"), launched[0].defines): True}


def mixing_shapes(points: int, mixed_points: int) -> list[tuple[int, ...]]:
    """256 channels in 4 groups, two queries."""
    maps = [(1, 256, 8 >> level, 8 >> level) for level in range(4)]
    return [*maps, (1, 2, 4, points, 3), (1, 2, 4 * (64 * 64 + mixed_points * points))]


@pytest.mark.gpu
def test_the_detector_gives_the_same_detections_with_kernels() -> None:
    deployed = DeployedDetector(random_detector(), small_info((160, 192)))
    images, sizes = uint8_batch([random_picture(seed, 150, 180) for seed in range(3)], 160, 192)
    expected = deployed(images, sizes)
    deployed.cuda()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs as its PyTorch definition")
        runs = [deployed(images.cuda(), sizes.cuda()) for _ in range(2)]
    with definitions_only():
        runs.append(deployed(images.cuda(), sizes.cuda()))
    for found in runs:
        torch.testing.assert_close(found[1].cpu(), expected[1], atol=1e-4, rtol=0)
        assert torch.equal(found[3].cpu(), expected[3])


@pytest.mark.gpu
def test_a_cuda_graph_holds_the_whole_model() -> None:
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
