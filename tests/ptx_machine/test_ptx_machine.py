"""The machine that executes PTX must find what is wrong: every fault here is planted into a kernel's source."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import asag.trt_plugins.compile
from asag.trt_plugins.compile import kernel_source
from tests.ptx_machine.arithmetic import COMPARISONS, convert, function_of
from tests.ptx_machine.launch import run_ptx
from tests.ptx_machine.memory import KernelFaultError
from tests.ptx_machine.work import Work
from tests.trt_plugins.kernel_cases import (
    LEVELS,
    SAMPLINGS,
    Array,
    attention_inputs,
    grid_inputs,
    mixing_inputs,
    probing_inputs,
    pyramid,
    roi_boxes,
    scores_with_ties,
    to_element,
)

BARRIER = re.compile(r"__sync(threads|warp)\(\);")
KERNELS = (
    "adaptive_probing",
    "deformable_attention",
    "gather_anchors",
    "pyramid_roi_align",
    "sample_grid",
    "sampling_mixing",
    "select_tokens",
)


def mixing(tensor_cores: bool, work: Work | None = None) -> list[Array]:
    element = "float16" if tensor_cores else "float32"
    *maps, points, parameters = mixing_inputs(1, 1, 1, (4, 64, 32, 128), (16, 24))
    inputs = [*(to_element(map_, element) for map_ in maps), points, to_element(parameters, element)]
    return run_ptx("SamplingMixing", inputs, {"mixed_points": 128}, element, True, tensor_cores, work=work)


def runs_of(kernel: str) -> Iterator[Callable[[], list[Array]]]:
    """Launches that together pass every line of the kernel."""
    if kernel == "adaptive_probing":
        for capacity in (7, 40):
            attributes = {"stride": 16, "capacity": capacity}
            yield lambda attributes=attributes: run_ptx("AdaptiveProbing", probing_inputs(count=300), attributes)
    elif kernel == "gather_anchors":
        anchors, valid, _, _ = probing_inputs(count=300, coarse=True)
        for threshold, fewest, most in ((0.1, 50, 40), (0.6, 90, 200)):
            attributes = {"first": 60, "keep_threshold": threshold, "fewest": fewest, "most": most}
            yield lambda attributes=attributes: run_ptx("GatherAnchors", [anchors, valid], attributes)
    elif kernel == "pyramid_roi_align":
        random = np.random.default_rng(0)
        inputs = [*pyramid(random, 1, 64, (20, 28)), roi_boxes(random, 1, 7, 112)]
        for channels_last in (False, True):
            yield lambda last=channels_last: run_ptx("PyramidRoIAlign", inputs, None, "float32", last)
    elif kernel == "deformable_attention":
        inputs = attention_inputs(channels=32)
        yield lambda: run_ptx("MultiScaleDeformableAttention", inputs, LEVELS)
    elif kernel == "sample_grid":
        for attributes in SAMPLINGS:
            yield lambda attributes=attributes: run_ptx("SampleGrid", grid_inputs(), attributes)
    elif kernel == "select_tokens":
        inputs = [scores_with_ties(0, 2, 300), np.array([40, 7])]
        yield lambda: run_ptx("SelectTokens", inputs, {"capacity": 50})
    else:
        yield from (lambda cores=cores: mixing(cores) for cores in (False, True))


def faults(kernel: str) -> list[str]:
    found = []
    for run in runs_of(kernel):
        try:
            run()
        except KernelFaultError as fault:
            found.append(str(fault))
    return found


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Compile another text in place of a kernel's file."""

    def replace(file_name: str, text: str) -> None:
        monkeypatch.setattr(
            asag.trt_plugins.compile, "kernel_source", lambda name: text if name == file_name else kernel_source(name)
        )

    return replace


def replaced(file_name: str, old: str, new: str) -> str:
    text = kernel_source(file_name)
    assert old in text, old
    return text.replace(old, new)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernels_have_no_fault(kernel: str) -> None:
    assert not faults(kernel)


@pytest.mark.parametrize(
    ("kernel", "number"),
    [(kernel, at) for kernel in KERNELS for at in range(len(BARRIER.findall(kernel_source(f"{kernel}.cu"))))],
)
def test_every_barrier_is_needed(kernel: str, number: int, plant: Callable[[str, str], None]) -> None:
    text = kernel_source(f"{kernel}.cu")
    start, end = [match.span() for match in BARRIER.finditer(text)][number]
    plant(f"{kernel}.cu", text[:start] + text[end:])
    assert any(fault.startswith(("a race", "shared memory is read before")) for fault in faults(kernel))


@pytest.mark.parametrize("kernel", ["gather_anchors", "select_tokens"])
def test_sums_over_the_block_need_their_barrier(kernel: str, plant: Callable[[str, str], None]) -> None:
    there = "/ WARP_SIZE] = of_warp;\n        __syncthreads();"
    plant("device.cuh", replaced("device.cuh", there, there.removesuffix("__syncthreads();")))
    assert faults(kernel)


def test_a_barrier_of_the_warp_orders_no_other_warp(plant: Callable[[str, str], None]) -> None:
    there = "/ WARP_SIZE] = of_warp;\n        __syncthreads();"
    plant("device.cuh", replaced("device.cuh", there, there.replace("threads()", "warp()")))
    assert any(fault.startswith(("a race", "shared memory is read before")) for fault in faults("select_tokens"))


def test_reading_what_an_asynchronous_copy_has_not_brought_yet_is_found(plant: Callable[[str, str], None]) -> None:
    plant("sampling_mixing.cu", replaced("sampling_mixing.cu", "wait_for_copies();", ""))
    assert all("before it is written" in fault for fault in faults("sampling_mixing"))


@pytest.mark.parametrize(
    ("file_name", "old", "new", "message"),
    [
        ("sampling_mixing.cu", "constexpr int PAD = 8;", "constexpr int PAD = 4;", "no multiple of 16"),
        ("sampling_mixing.cu", "wait_for_copies();", "if (threadIdx.x < 32) __syncthreads();", "for ever"),
        ("sampling_mixing.cu", "taps + work * 2", "taps + (work + 1) * 2", "outside every shared variable"),
        ("pyramid_roi_align.cu", "boxes[query * 4 + 2]", "boxes[query * 5 + 2]", "may not"),
        ("device.cuh", "__shfl_xor_sync(FULL_WARP", "__shfl_xor_sync(0xffff", "part of the warp"),
    ],
)
def test_planted_faults_are_found(
    file_name: str, old: str, new: str, message: str, plant: Callable[[str, str], None]
) -> None:
    plant(file_name, replaced(file_name, old, new))
    kernel = "sampling_mixing" if file_name == "device.cuh" else file_name.removesuffix(".cu")
    assert any(message in fault for fault in faults(kernel))


def test_an_output_that_is_not_written_whole_is_found(plant: Callable[[str, str], None]) -> None:
    text = kernel_source("gather_anchors.cu")
    plant("gather_anchors.cu", text.replace("blockIdx.x", "0"))
    assert any("written twice" in fault for fault in faults("gather_anchors"))


def test_an_order_of_threads_that_shows_is_found(plant: Callable[[str, str], None]) -> None:
    """Without the second key, which of two equal confidences comes first is left to the order of the threads."""
    plant(
        "device.cuh",
        replaced("device.cuh", "high < other.high || (high == other.high && low < other.low)", "high < other.high"),
    )
    anchors, valid, _, _ = probing_inputs(count=300, coarse=True)
    attributes = {"first": 60, "keep_threshold": 0.1, "fewest": 50, "most": 40}
    runs = [run_ptx("GatherAnchors", [anchors, valid], attributes, backwards=way) for way in (False, True)]
    assert runs[0][0].tobytes() != runs[1][0].tobytes()


def values(*items: Any, dtype: str) -> Array:
    return np.array(items, dtype)


def test_arithmetic_at_its_edges() -> None:
    odd = values(np.nan, np.inf, -1e30, 2.7, -2.7, dtype="f4")
    assert convert(odd, np.dtype("i4"), ("rzi",)).tolist() == [0, 2**31 - 1, -(2**31), 2, -2]
    assert convert(odd, np.dtype("f4"), ("sat",)).tolist() == [0, 1, 0, 1, 0]
    assert convert(values(-1, dtype="i4"), np.dtype("i8"), ()).tolist() == [-1]
    assert convert(values(2**32 + 5, dtype="u8"), np.dtype("u4"), ()).tolist() == [5]
    least = function_of(("min", "f32"))
    assert least is not None
    assert least(values(np.nan, dtype="f4"), values(3, dtype="f4")).tolist() == [3]
    down, exact = function_of(("fma", "rm", "f32")), 1 + 2.0**-30
    assert down is not None
    assert down(*(values(item, dtype="f4") for item in (1, 1, -(2.0**-30)))).tolist() == [1 - 2.0**-24] != [exact]
    high = function_of(("mul", "hi", "s32"))
    assert high is not None
    assert high(values(-(2**31), dtype="i4"), values(2, dtype="i4")).tolist() == [-1]
    right = function_of(("shr", "s32"))
    assert right is not None
    assert right(values(-8, dtype="i4"), values(40, dtype="u4")).tolist() == [-1]
    insert = function_of(("bfi", "b32"))
    assert insert is not None
    parts = (values(item, dtype="u4") for item in (0b101, 0xFFFF, 4, 4))
    assert insert(*parts).tolist() == [0xFF5F]
    nan, one = values(np.nan, dtype="f4"), values(1, dtype="f4")
    assert [bool(COMPARISONS[name](nan, one)[0]) for name in ("ne", "neu", "lt", "ltu", "nan")] == [0, 1, 0, 1, 1]


def test_work_is_counted_as_the_hardware_would() -> None:
    work, lanes = Work(), np.arange(32)
    work.count_global(lanes * 4, 4, lanes)
    assert (work.sectors, work.fewest_sectors) == (4, 4)
    work.count_global(lanes * 128, 4, lanes)
    assert (work.sectors, work.fewest_sectors) == (36, 8)
    work.count_shared(lanes * 4, 4, lanes)
    work.count_shared(lanes * 0, 4, lanes)  # one word for all
    assert (work.passes, work.fewest_passes) == (2, 2)
    work.count_shared(lanes * 128, 4, lanes)
    assert (work.passes, work.fewest_passes) == (34, 3)
    work.count_shared(lanes * 16, 16, lanes)
    assert (work.passes, work.fewest_passes) == (38, 7)
    work.count_instruction("add", np.concatenate((lanes, lanes + 64)))
    assert work.instructions["add"] == 2
