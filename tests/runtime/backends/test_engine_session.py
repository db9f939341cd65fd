"""Running engines: batches, profiles, graphs, waits, threads and errors, against stand-ins for the GPU and TensorRT."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asag.runtime import open_session
from asag.runtime.engines.backend import BACKENDS
from asag.runtime.errors import BackendUnavailableError
from asag.runtime.postprocessing import Detections
from tests.builders import random_picture
from tests.exports import small_export
from tests.runtime import cuda_stand_in, engine_stand_in
from tests.runtime.cuda_stand_in import ALLOCATIONS, SYNCHRONIZATIONS, Error, StandInCuda
from tests.runtime.engine_stand_in import StandInMachine, assert_right, batch_of
from tests.runtime.toy_detector import ToySession, toy_metadata

MIXED_SIZES = (1, 3, 1, 6, 4, 5, 2)


def write_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + 5 * number, 90 - 3 * number, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def same(found: list[Detections], expected: list[Detections]) -> bool:
    return len(found) == len(expected) and all(
        np.array_equal(getattr(ours, field.name), getattr(theirs, field.name))
        for ours, theirs in zip(found, expected, strict=True)
        for field in dataclasses.fields(Detections)
    )


@pytest.mark.parametrize("contexts", [1, 2, 3])
def test_a_folder_gives_what_onnx_runtime_gives(machine: StandInMachine, contexts: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", 11)
    session = machine.open(contexts=contexts)
    assert (session.backend, session.max_batch) == (machine.backend, 6)
    with open_session(machine.onnx_path, threads=1) as reference:
        for batch_size in (1, 2, 4, 5, 6):
            assert same(session.detect(folder, batch_size), reference.detect(folder, batch_size))


def test_each_batch_runs_on_the_profile_for_its_size(machine: StandInMachine) -> None:
    session = machine.open()
    for count in MIXED_SIZES:
        assert_right(session.run(batch_of(count)), batch_of(count))
    assert machine.engine.runs == [(0, 1), (1, 3), (0, 1), (2, 6), (1, 4), (2, 5), (1, 2)]


def test_the_steady_state_allocates_nothing_and_waits_once_a_batch(machine: StandInMachine) -> None:
    session = machine.open(contexts=2)
    images = [np.random.default_rng(n).integers(0, 256, (50, 70, 3), np.uint8) for n in range(27)]
    first = session.detect(images, 6)  # each size on each slot: once plainly, then as it is captured
    for _ in range(3):
        session.detect(images, 6)
    machine.cuda.calls.clear()
    contexts, runs = len(machine.engine.contexts), len(machine.engine.runs)
    assert same(session.detect(images, 6), first)
    batches = 5
    assert len(machine.engine.contexts) == contexts
    assert len(machine.engine.runs) - runs == batches
    calls = Counter(machine.cuda.calls)
    expected = {
        "cudaSetDevice": batches,
        "cudaMemcpyAsync": batches * (2 + 4),
        "cudaEventRecord": batches,
        "cudaEventSynchronize": batches,
    }
    if machine.backend == "tensorrt":
        expected["cudaGraphLaunch"] = batches
    assert calls == expected
    assert not any(calls[name] for name in (*ALLOCATIONS, *SYNCHRONIZATIONS))


def test_the_next_batch_is_started_before_the_first_is_waited_for(machine: StandInMachine) -> None:
    session = machine.open(contexts=2)
    images = [np.full((64, 96, 3), 20 * number, np.uint8) for number in range(8)]
    machine.cuda.trace.clear()
    session.detect(images, 2)
    steps = [name for name in machine.cuda.trace if name in ("cudaEventRecord", "cudaEventSynchronize")]
    start, wait = "cudaEventRecord", "cudaEventSynchronize"
    assert steps == [start, start, wait, start, wait, start, wait, wait]


def test_nothing_runs_before_it_is_waited_for_and_the_order_is_free(machine: StandInMachine) -> None:
    session = machine.open(contexts=3)
    pending = [session.submit(batch_of(2, seed)) for seed in range(3)]
    assert machine.engine.runs == []
    for seed in (2, 0, 1):
        assert_right(pending[seed].result(), batch_of(2, seed))


def test_one_caller_at_a_time_needs_one_slot(machine: StandInMachine) -> None:
    session = machine.open(contexts=4)
    for seed in range(5):
        assert_right(session.run(batch_of(2, seed)), batch_of(2, seed))
    assert len(machine.engine.contexts) == 1


def test_inputs_may_change_after_submitting(machine: StandInMachine) -> None:
    session = machine.open()
    tensors = batch_of(4)
    pending = session.submit(tensors)
    for array in tensors.values():
        array[...] = 1
    assert_right(pending.result(), batch_of(4))


def test_results_are_copies_that_outlive_later_runs_and_the_session(machine: StandInMachine) -> None:
    session = machine.open(contexts=1)
    left_alone = session.submit(batch_of(3, 1))
    found = session.run(batch_of(3, 2))
    for seed in range(3, 6):
        session.run(batch_of(3, seed))
    last = session.submit(batch_of(3, 6))
    session.close()
    assert_right(left_alone.result(), batch_of(3, 1))
    assert_right(found, batch_of(3, 2))
    assert_right(last.result(), batch_of(3, 6))
    with pytest.raises(ValueError, match=r"toy.engine is closed"):
        session.run(batch_of(1))


def test_a_stream_that_is_given_up_leaves_the_session_usable(machine: StandInMachine) -> None:
    session = machine.open()
    images = [np.full((64, 96, 3), 20 * number, np.uint8) for number in range(8)]
    stream = session.stream(images, 1)
    next(stream)
    stream.close()
    with open_session(machine.onnx_path, threads=1) as reference:
        assert same(session.detect(images, 2), reference.detect(images, 2))


def test_a_shape_is_captured_once_for_each_slot_when_it_runs_again(machine: StandInMachine) -> None:
    session = machine.open(contexts=2)
    for seed in range(8):
        for count in (2, 3):
            pending = [session.submit(batch_of(count, seed + other)) for other in (0, 1)]
            for other in (0, 1):
                assert_right(pending[other].result(), batch_of(count, seed + other))
    captures = 4 if machine.backend == "tensorrt" else 0
    assert machine.cuda.calls["cudaGraphInstantiate"] == captures
    assert len(machine.engine.runs) == 32
    assert session.graph_failure is None
    if not captures:
        (configuration,) = machine.engine.configurations
        assert configuration.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
        assert configuration.cache is not None


def test_where_capturing_fails_batches_are_enqueued(machine: StandInMachine) -> None:
    session = machine.open()
    machine.module.uncapturable = True
    for seed in range(6):
        assert_right(session.run(batch_of(2, seed)), batch_of(2, seed))
    if machine.backend == "tensorrt":
        assert machine.cuda.calls["cudaStreamBeginCapture"] == 1
        assert session.graph_failure is not None
        assert "cudaErrorStreamCaptureInvalidated" in session.graph_failure
    assert machine.cuda.calls["cudaGraphLaunch"] == 0


@pytest.mark.parametrize("contexts", [1, 2, 4])
def test_threads_share_a_session(machine: StandInMachine, contexts: int) -> None:
    session = machine.open(contexts=contexts)
    reference = ToySession()

    def work(thread: int) -> bool:
        images = [np.random.default_rng((thread, n)).integers(0, 256, (64, 96, 3), np.uint8) for n in range(7)]
        for batch_size in (1, 2, 5):
            found = session.detect(images, batch_size)
            for ours, theirs in zip(found, reference.detect(images, batch_size), strict=True):
                if not np.allclose(ours.scores, theirs.scores, atol=1e-5):
                    return False
        for seed in range(20):
            assert_right(session.run(batch_of(3, 100 * thread + seed)), batch_of(3, 100 * thread + seed))
        return True

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(usual)


def test_a_batch_that_is_refused_leaves_the_session_usable(machine: StandInMachine) -> None:
    session = machine.open(contexts=1)
    for _ in range(3):
        assert_right(session.run(batch_of(2)), batch_of(2))
    before = session.submit(batch_of(2, 5))
    machine.module.refusals = 1
    with pytest.raises(RuntimeError, match="could not run a batch: refused"):
        session.run(batch_of(3))
    assert_right(before.result(), batch_of(2, 5))
    assert_right(session.run(batch_of(3)), batch_of(3))


def test_an_error_on_the_gpu_is_raised_where_the_result_is_asked_for(machine: StandInMachine) -> None:
    session = machine.open(contexts=1)
    failing = session.submit(batch_of(2))
    machine.cuda.launch_error = Error.cudaErrorLaunchFailure
    other = session.submit(batch_of(2, 1))
    with pytest.raises(RuntimeError, match="cudaEventSynchronize failed: cudaErrorLaunchFailure"):
        failing.result()
    assert_right(other.result(), batch_of(2, 1))


def test_inputs_that_do_not_fit_are_refused(machine: StandInMachine) -> None:
    session = machine.open()
    with pytest.raises(ValueError, match="takes 1 to 6 images, not 7"):
        session.run(batch_of(7))
    with pytest.raises(ValueError, match=r"images must be uint8 \[1, 3, 64, 96\], it is float32"):
        session.run(batch_of(1) | {"images": np.zeros((1, 3, 64, 96), np.float32)})
    with pytest.raises(ValueError, match=r"sizes must be float32 \[2, 2\], it is float32 \[1, 2\]"):
        session.run(batch_of(2) | {"sizes": np.zeros((1, 2), np.float32)})
    assert machine.engine.runs == []
    with pytest.raises(ValueError, match="number of contexts"):
        open_session(machine.path, contexts=0)


def test_memory_that_runs_out_when_opening_is_given_back(machine: StandInMachine) -> None:
    for allocations in range(26):
        machine.cuda.allocations_left = allocations
        with pytest.raises(RuntimeError, match="cudaErrorMemoryAllocation"):
            machine.open(contexts=2)
        assert machine.cuda.outstanding() == {}
    machine.cuda.allocations_left = 26  # scratch memory, 6 buffers and 6 pinned ones for each of the two
    assert_right(machine.open(contexts=2).run(batch_of(1)), batch_of(1))


def test_engines_that_do_not_fit_the_machine(machine: StandInMachine, toy_onnx: Path) -> None:
    backend = BACKENDS[machine.backend]
    engine_stand_in.write_engine(toy_onnx, toy_metadata(), backend.name, version="9.9")
    with pytest.raises(ValueError, match=f"was built by {backend.title} 9.9, this machine has 11.4; build the engine"):
        open_session(machine.path)
    engine_stand_in.write_engine(toy_onnx, toy_metadata(), backend.name, targets=("sm_89",))
    with pytest.raises(ValueError, match="was built for sm_89, and Stand-in GPU is sm_86"):
        open_session(machine.path)
    machine.cuda.capability = (6, 1)
    with pytest.raises(BackendUnavailableError, match=r"do not run on Stand-in GPU \(compute capability 6.1\)"):
        open_session(machine.path)
    with pytest.raises(BackendUnavailableError, match="there is no GPU 3; this machine has 1"):
        open_session(machine.path, device="cuda:3")
    assert machine.cuda.outstanding() == {}


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (Error.cudaErrorInsufficientDriver, "no NVIDIA driver on this machine, or one too old"),
        (Error.cudaErrorInvalidDevice, "no NVIDIA GPU that CUDA can use on this machine"),
    ],
)
def test_a_machine_without_a_gpu(
    machine: StandInMachine, monkeypatch: pytest.MonkeyPatch, status: Error, reason: str
) -> None:
    monkeypatch.setattr(machine.cuda, "cudaGetDeviceCount", lambda: (status, 0))
    with pytest.raises(BackendUnavailableError, match=reason):
        open_session(machine.path)


def test_content_that_the_runtime_cannot_open(machine: StandInMachine, toy_onnx: Path) -> None:
    toy_onnx.write_bytes(b"no model")
    engine_stand_in.write_engine(toy_onnx, toy_metadata(), machine.backend)
    with pytest.raises(ValueError, match=r"cannot open .*toy.engine: this is no engine; build the engine again"):
        open_session(machine.path)
    assert machine.cuda.outstanding() == {}


def test_what_an_inspection_asks_for(machine: StandInMachine) -> None:
    session = machine.open()
    assert session.layer_information() == ["one", "two + three"]
    assert session.device_memory() == [1000, 4000, 6000]


@pytest.mark.slow
def test_an_exported_detector_gives_what_onnx_runtime_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandInCuda()
    cuda_stand_in.install(monkeypatch, cuda)
    engine_stand_in.install(monkeypatch, cuda, "tensorrt", (1, 3))
    exported = small_export()
    model = exported.write(tmp_path / "small.onnx")
    path = engine_stand_in.write_engine(model, exported.metadata, "tensorrt", (1, 3))
    pictures = [random_picture(number, 100 + 9 * number, 190 - 8 * number) for number in range(7)]
    with open_session(model, threads=1) as reference, open_session(path) as session:
        for batch_size in (1, 2, 3):
            assert same(session.detect(pictures, batch_size), reference.detect(pictures, batch_size))
    assert cuda.outstanding() == {}
