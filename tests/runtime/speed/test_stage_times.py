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
from torch import Tensor

from asag.deploy import DeployedDetector
from asag.detector import Predictions
from asag.family import Stage, Value
from asag.runtime.backends.onnxruntime_session import OnnxRuntimeSession
from asag.runtime.backends.pytorch_session import PyTorchSession
from asag.runtime.speed.stage_times import StageTimes, measure_stages
from asag.runtime.speed.table import stage_times_table
from asag.runtime.stages.graph import network_parts, node_parts
from tests.builders import random_detector, random_picture, small_config, small_info
from tests.exports import small_export
from tests.runtime.toy_detector import ToySession, build_toy_model, toy_metadata

IMAGES = [random_picture(seed, 150, 180) for seed in range(3)]

PARTS = ("features", "anchors", "proposals", "head", "detections")


def test_every_stage_has_its_time(tmp_path: Path) -> None:
    exported = small_export()
    assert network_parts(exported.metadata) == PARTS
    files = [exported.write(tmp_path / f"{precision}.onnx", precision) for precision in ("fp32", "fp16")]
    sessions = [
        PyTorchSession(exported.deployed, "small"),
        *(OnnxRuntimeSession(path, threads=1) for path in files),
        ToySession(),
    ]
    seen: list[tuple[int, int]] = []
    rows = measure_stages(
        sessions, IMAGES, rounds=4, warmup=1, batch_size=2, threads=1, progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (5, 5)
    for row in rows[:3]:
        assert row.reason is None
        assert {"pre-processing", *PARTS, "post-processing"} <= set(row.p50_ms)
        assert all(value >= 0 for value in row.p50_ms.values()), "a profiler counts whole microseconds"
        assert row.p50_ms["features"] > 0
        assert row.share(*row.p50_ms) == pytest.approx(1)
        assert row.share("other") < 0.02, "nearly every node of the optimized graph is known"
    assert rows[3] == StageTimes("toy", "numpy", "fp32", {}, "numpy does not tell its stages apart")
    console = Console(file=io.StringIO(), width=80)
    console.print(stage_times_table(rows))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "features" in text
    assert "small (pytorch): pre- and post-processing take" in text
    assert "toy (numpy): no stages" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("stage", PARTS)
def test_a_slow_part_of_pytorch(stage: str) -> None:
    deployed = DeployedDetector(random_detector(), small_info())
    detector, choose_best = deployed.detector, deployed.best

    def wait(*_: object) -> None:
        time.sleep(0.4)

    def choose_slowly(found: Predictions) -> tuple[Tensor, Tensor, Tensor]:
        wait()
        return choose_best(found)

    modules = {
        "features": detector.neck,
        "anchors": detector.anchor_generator.fixed_mlp,
        "proposals": detector.proposals.feed_forward,
        "head": detector.heads["main"].feed_forward,
    }
    if stage in modules:
        modules[stage].register_forward_pre_hook(wait)
    else:
        deployed.best = choose_slowly  # type: ignore[method-assign]
    (row,) = measure_stages([PyTorchSession(deployed, "small")], IMAGES, rounds=1, warmup=0)
    assert row.p50_ms[stage] >= 400
    assert row.share(stage) > 0.7


@pytest.mark.parametrize("stage", PARTS)
def test_slow_nodes_of_an_exported_file(stage: str, tmp_path: Path) -> None:
    value = {
        "features": "features/p5",
        "anchors": "P4_anchors/boxes",
        "proposals": "proposals/queries",
        "head": "head/logits",
        "detections": "scores",
    }[stage]
    slow = tmp_path / "slow.onnx"
    onnx.save(add_matrix_products(small_export().model(), value), slow)
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
    """What is read inside a loop's body counts as read by the loop; what no stage needs makes the detections."""
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
    ends = {"features": {"features"}, "anchors": {"chosen"}, "proposals": {"none"}}
    assert node_parts(nodes, ends) == ["features"] * 3 + ["anchors", "detections"]


def test_a_file_that_names_no_stages_has_no_times_of_them(toy_onnx: Path) -> None:
    (row,) = measure_stages([OnnxRuntimeSession(toy_onnx, threads=1)], IMAGES)
    assert row.reason == "onnxruntime-cpu does not tell its stages apart"


def test_a_graph_without_the_stages_of_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "toy.onnx"
    onnx.save(build_toy_model(toy_metadata(stages=(Stage("features", (Value("p2", "maps"),)),))), path)
    with pytest.raises(ValueError, match=r"toy\.onnx: the graph does not name the values of features; export it again"):
        measure_stages([OnnxRuntimeSession(path, threads=1)], IMAGES)


@pytest.mark.gpu
def test_stages_on_a_gpu() -> None:
    deployed = DeployedDetector(random_detector(small_config(decoder="sparse_rcnn")), small_info())
    session = PyTorchSession(deployed, "small", "cuda")
    (row,) = measure_stages([session], IMAGES, rounds=3)
    assert {"copies", *PARTS} <= set(row.p50_ms)
    assert all(value > 0 for value in row.p50_ms.values())
