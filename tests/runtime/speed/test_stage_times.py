"""Time per stage: what a test makes slow is found in the stage where it is."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from runtime.graph_stages import NETWORK_STAGES, node_stages, stage_ends

from asag.deploy import DeployedDetector
from export.model import export_onnx
from runtime.backends.onnxruntime_session import OnnxRuntimeSession
from runtime.backends.pytorch_session import PyTorchSession
from runtime.speed.stage_times import StageTimes, measure_stages
from runtime.speed.table import stage_times_table
from tests.builders import random_detector, random_picture, small_config, small_info
from tests.runtime.toy_detector import ToySession

IMAGES = [random_picture(seed, 150, 180) for seed in range(3)]


@pytest.fixture(scope="module")
def deployed() -> DeployedDetector:
    return DeployedDetector(random_detector(), small_info())


@pytest.fixture(scope="module")
def exported(deployed: DeployedDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stages") / "model.onnx"
    export_onnx(deployed, path)
    return path


def test_every_stage_has_its_time(deployed: DeployedDetector, exported: Path) -> None:
    half = exported.with_name("half.onnx")
    export_onnx(deployed, half, "fp16")
    sessions = [
        PyTorchSession(deployed, "small"),
        *(OnnxRuntimeSession(path, threads=1) for path in (exported, half)),
        ToySession(),
    ]
    seen: list[tuple[int, int]] = []
    rows = measure_stages(
        sessions, IMAGES, rounds=4, warmup=1, batch_size=2, threads=1, progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (5, 5)
    for row in rows[:3]:
        assert row.reason is None
        assert {"pre-processing", *NETWORK_STAGES, "post-processing"} <= set(row.p50_ms)
        assert all(value > 0 for value in row.p50_ms.values())
        assert row.share(*row.p50_ms) == pytest.approx(1)
        assert row.share("other") < 0.02, "nearly every node of the optimized graph is known"
    assert rows[3] == StageTimes("toy", "numpy", "fp32", {}, "numpy does not tell its stages apart")
    console = Console(file=io.StringIO(), width=80)
    console.print(stage_times_table(rows))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "backbone" in text
    assert "small (pytorch): pre- and post-processing take" in text
    assert "toy (numpy): no stages" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("stage", NETWORK_STAGES)
def test_a_slow_module_of_pytorch(stage: str) -> None:
    deployed = DeployedDetector(random_detector(), small_info())
    detector = deployed.detector
    module = {
        "backbone+neck": detector.neck,
        "anchors": detector.anchor_generator.fixed_mlp,
        "proposals": detector.proposals.feed_forward,
        "head": detector.heads["main"].feed_forward,
    }[stage]
    module.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    (row,) = measure_stages([PyTorchSession(deployed, "small")], IMAGES, rounds=1, warmup=0)
    assert row.p50_ms[stage] >= 200
    assert row.share(stage) > 0.7


@pytest.mark.parametrize("stage", NETWORK_STAGES)
def test_slow_nodes_of_an_exported_file(stage: str, exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported)
    nodes = {node.op_type: node for node in model.graph.node}
    last_of_proposals = max(order(model.graph, name) for name in stage_ends(model.graph)["proposals"])
    value = {
        "backbone+neck": nodes["PyramidRoIAlign"].input[3],
        "anchors": nodes["GatherAnchors"].input[0],
        "proposals": model.graph.node[last_of_proposals].input[0],
        "head": "scores",
    }[stage]
    slow = tmp_path / "slow.onnx"
    onnx.save(add_matrix_products(model, value), slow)
    (row,) = measure_stages([OnnxRuntimeSession(slow, threads=1)], IMAGES, rounds=3, warmup=1, threads=1)
    assert row.share(stage) > 0.6, row.p50_ms


def order(graph: onnx.GraphProto, value: str) -> int:
    return next(index for index, node in enumerate(graph.node) if value in node.output)


def add_matrix_products(model: onnx.ModelProto, value: str, side: int = 1000) -> onnx.ModelProto:
    """The model with a long computation of zero added to a value, which no optimizer can know beforehand."""
    graph = model.graph
    index = order(graph, value)
    for node in graph.node:
        node.output[:] = ["before_slow" if name == value else name for name in node.output]
    graph.initializer.append(numpy_helper.from_array(np.zeros((side, side), np.float32), "slow_zeros"))
    graph.initializer.append(numpy_helper.from_array(np.array([0, 1], np.int64), "slow_axes"))
    nodes = [
        helper.make_node("ReduceSum", ["sizes", "slow_axes"], ["slow_scale"], keepdims=0),
        helper.make_node("Mul", ["slow_zeros", "slow_scale"], ["slow_0"]),
        *(helper.make_node("MatMul", [f"slow_{n}", "slow_0"], [f"slow_{n + 1}"]) for n in range(4)),
        helper.make_node("ReduceSum", ["slow_4", "slow_axes"], ["slow_sum"], keepdims=0),
        helper.make_node("Add", ["before_slow", "slow_sum"], [value]),
    ]
    for offset, node in enumerate(nodes, start=1):
        node.name = f"slow_node_{offset}"
        graph.node.insert(index + offset, node)
    return model


def test_a_loop_belongs_to_the_stage_that_reads_it() -> None:
    """What is read inside a loop's body counts as read by the loop; what nothing before needs is the head's."""
    iteration = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    condition = helper.make_tensor_value_info("go", TensorProto.BOOL, [])
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["again"]), helper.make_node("Neg", ["from_outside"], ["negated"])],
        "body",
        [iteration, condition],
        [helper.make_tensor_value_info(name, kind, []) for name, kind in (("again", 9), ("negated", 1))],
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["from_outside"]),
        helper.make_node("Loop", ["count", ""], ["looped"], body=body),
        helper.make_node("Abs", ["looped"], ["features"]),
        helper.make_node("Exp", ["features"], ["chosen"]),
        helper.make_node("Exp", ["x"], ["apart"]),
    ]
    ends = {"backbone+neck": {"features"}, "anchors": {"chosen"}, "proposals": {"none"}}
    assert node_stages(nodes, ends) == ["backbone+neck"] * 3 + ["anchors", "head"]


def test_what_is_no_export_has_no_stages(toy_onnx: Path) -> None:
    with pytest.raises(ValueError, match="not an asag model"):
        measure_stages([OnnxRuntimeSession(toy_onnx, threads=1)], IMAGES)


@pytest.mark.gpu
def test_stages_on_a_gpu() -> None:
    deployed = DeployedDetector(random_detector(small_config(decoder="sparse_rcnn")), small_info())
    session = PyTorchSession(deployed, "small", "cuda")
    (row,) = measure_stages([session], IMAGES, rounds=3)
    assert {"copies", *NETWORK_STAGES} <= set(row.p50_ms)
    assert all(value > 0 for value in row.p50_ms.values())
