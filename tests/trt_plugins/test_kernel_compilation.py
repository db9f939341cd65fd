"""Every kernel through NVRTC, for every architecture, without a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from asag.trt_plugins.compile import (
    ARCHITECTURES,
    FIRST_WITH_TENSOR_CORES,
    compile_plan,
    resource_usage,
    supported_capabilities,
)
from asag.trt_plugins.operations import OPERATIONS, STATIC_SHARED_LIMIT
from asag.trt_plugins.plan import Plan, make_plan
from benchmarks.kernel_cases import DEMO, PUBLISHED, Case, cases, signature
from benchmarks.kernel_resources import resource_rows

pytestmark = pytest.mark.usefixtures("compiler")


def uses_tensor_cores(case: Case, capability: int) -> bool:
    """Whether launching this op in 16 bits on that GPU takes the tensor cores."""
    return case.name == "SamplingMixing" and capability >= FIRST_WITH_TENSOR_CORES


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_published_kernels_compile_without_spills(capability: int, name: str) -> None:
    if capability not in supported_capabilities():
        pytest.skip(f"this NVRTC does not know sm_{capability}")
    for case in cases(PUBLISHED):
        # bfloat16 differs from float16 in conversions only; it is compiled for one architecture below.
        if case.name != name or case.element == "bfloat16":
            continue
        if case.element == "float16" and case.tensor_cores != uses_tensor_cores(case, capability):
            continue
        usage = resource_usage(case.plan(), capability)
        assert usage.spill_bytes == 0, f"{case.kind} spills {usage.spill_bytes} bytes"
        assert usage.stack_bytes == 0, f"{case.kind} keeps {usage.stack_bytes} bytes of registers in memory"
        assert 0 < usage.registers <= 65536 // case.plan().threads
        assert usage.shared_bytes <= STATIC_SHARED_LIMIT


@pytest.mark.parametrize("case", [*cases(DEMO)], ids=lambda case: f"{case.name} {case.kind}")
def test_demo_kernels_compile_without_spills(case: Case) -> None:
    usage = resource_usage(case.plan(), 90)
    assert usage.spill_bytes == usage.stack_bytes == 0


def test_bfloat16_compiles_at_the_published_sizes() -> None:
    for case in cases(PUBLISHED):
        if case.element == "bfloat16":
            assert resource_usage(case.plan(), 80).spill_bytes == 0, case


def test_tensor_cores_are_in_the_machine_code_only_where_asked() -> None:
    for case in cases(DEMO):
        if case.name == "SamplingMixing" and case.element != "float32":
            image = compile_plan(case.plan(), 80, ptx=True).image
            assert (b"mma.sync" in image) == case.tensor_cores, case.kind


def test_the_second_compilation_comes_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASAG_KERNEL_CACHE", str(tmp_path))
    shapes, attributes = signature("GatherAnchors", DEMO)
    plan = make_plan("GatherAnchors", shapes, attributes)
    others = [
        (plan, 80, False),
        (plan, 90, True),
        (make_plan("GatherAnchors", shapes, {**attributes, "most": 7}), 90, False),
    ]
    first = compile_plan(plan, 90)
    images = {first.image, *(compile_plan(*other).image for other in others)}
    assert len(images) == 4
    # Nothing half-written stays behind: four kernels, each with its log.
    assert len(list(tmp_path.iterdir())) == 8

    def refuse(*arguments: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr("asag.trt_plugins.compile._compile", refuse)
    assert compile_plan(plan, 90) == first
    with pytest.raises(AssertionError, match="compiled again"):
        compile_plan(plan, 86)


def test_an_error_shows_the_source_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASAG_KERNEL_CACHE", str(tmp_path))
    shapes, attributes = signature("GatherAnchors", DEMO)
    plan = make_plan("GatherAnchors", shapes, attributes)
    broken = dataclasses.replace(plan, defines=tuple(pair for pair in plan.defines if pair[0] != "MOST"))
    with pytest.raises(ValueError, match=r"gather_anchors\.cu\(\d+\): error: identifier \"MOST\" is undefined\n.*MOST"):
        compile_plan(broken, 90)
    assert not list(tmp_path.iterdir())


def test_the_table_names_every_case() -> None:
    rows = list(resource_rows(DEMO, [90]))
    assert len(rows) == len(list(cases(DEMO)))
    assert all(int(row[-1]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("groups", "points", "mixed", "message"),
    [(3, 32, 128, "share 256 channels"), (4, 30, 128, "multiples of 8"), (1, 32, 128, "does not fit")],
)
def test_sizes_without_a_kernel_are_refused(groups: int, points: int, mixed: int, message: str) -> None:
    sizes = dataclasses.replace(PUBLISHED, groups=groups, points=points, mixed_points=mixed)
    shapes, attributes = signature("SamplingMixing", sizes)
    with pytest.raises(ValueError, match=message):
        make_plan("SamplingMixing", shapes, attributes)


def test_probing_takes_as_many_anchors_as_shared_memory_holds() -> None:
    def plan(count: int) -> Plan:
        return make_plan(
            "AdaptiveProbing", [(1, count, 5), (1, count), (1, 8, 40, 40), (1, 2)], {"stride": 8, "capacity": 128}
        )

    most = (STATIC_SHARED_LIMIT - 3212) // 8
    assert STATIC_SHARED_LIMIT - 256 <= resource_usage(plan(most), 90).shared_bytes <= STATIC_SHARED_LIMIT
    with pytest.raises(ValueError, match=f"of {most + 1} anchors does not fit .* use the op's ONNX body"):
        plan(most + 1)


def test_calls_that_do_not_exist_are_refused() -> None:
    shapes, attributes = signature("GatherAnchors", DEMO)
    with pytest.raises(ValueError, match="no kernel for float16"):
        make_plan("GatherAnchors", shapes, attributes, "float16")
    with pytest.raises(ValueError, match="no channels-last"):
        make_plan("GatherAnchors", shapes, attributes, channels_last=True)
    with pytest.raises(ValueError, match="has 2 inputs, not 1"):
        make_plan("GatherAnchors", shapes[:1], attributes)
