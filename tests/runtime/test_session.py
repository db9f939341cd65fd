from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import asag.runtime.session
from asag.runtime import open_session
from asag.runtime.errors import BackendUnavailableError
from asag.runtime.session import Pending, check_device
from tests.runtime.toy_detector import HEIGHT, WIDTH, ToySession, build_toy_model, toy_metadata


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_onnx_session_gives_what_numpy_gives(toy_onnx: Path) -> None:
    images = [noise(40 + 9 * number, 90 - 7 * number, number) for number in range(5)]
    with open_session(toy_onnx, threads=1) as session:
        assert (session.backend, session.precision, session.max_batch) == ("onnxruntime-cpu", "fp32", None)
        assert session.metadata == toy_metadata()
        found = session.detect(images, batch_size=2)
    for ours, expected in zip(found, ToySession().detect(images), strict=True):
        assert np.array_equal(ours.labels, expected.labels)
        assert np.abs(ours.scores - expected.scores).max() < 1e-5
        assert np.abs(ours.boxes - expected.boxes).max() < 1e-4
        assert ours.image_size == expected.image_size


def test_a_bright_cell_is_found_where_it_is() -> None:
    pixels = np.zeros((128, 192, 3), np.uint8)
    pixels[32:64, 96:144] = 255
    (found,) = ToySession().detect([pixels])
    assert found.scores[0] == pytest.approx(1, abs=0.1)
    assert found.boxes[0].tolist() == [96, 32, 144, 64]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 7), st.integers(1, 5))
def test_batching_keeps_order_and_results(count: int, batch_size: int) -> None:
    images = [noise(30 + number, 50, number) for number in range(count)]
    session = ToySession()
    found = session.detect(images, batch_size=batch_size)
    assert len(found) == count
    assert sum(session.calls) == count
    assert all(call == batch_size for call in session.calls[:-1])
    for image, ours in zip(images, found, strict=True):
        (alone,) = ToySession().detect([image])
        assert np.array_equal(ours.boxes, alone.boxes)
        assert np.array_equal(ours.scores, alone.scores)


def test_stream_reads_one_batch_ahead_only() -> None:
    read = []

    def images() -> object:
        for number in range(10):
            read.append(number)
            yield noise(20, 20, number)

    stream = ToySession().stream(images(), batch_size=3)  # type: ignore[arg-type]
    next(stream)
    assert 3 <= len(read) <= 6
    stream.close()
    assert len(read) == 6


def test_detect_takes_paths_arrays_and_images(tmp_path: Path) -> None:
    pixels = noise(50, 70)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    found = ToySession().detect([path, str(path), pixels, Image.fromarray(pixels)])
    assert all(np.array_equal(other.scores, found[0].scores) for other in found)


def test_wrong_use_of_detect_is_refused() -> None:
    session = ToySession(max_batch=2)
    with pytest.raises(ValueError, match="at most 2 images"):
        session.detect([], batch_size=3)
    with pytest.raises(ValueError, match="at least 1"):
        session.detect([], batch_size=0)
    with pytest.raises(ValueError, match="list of images"):
        session.detect(Image.new("RGB", (9, 9)))  # type: ignore[arg-type]


def test_fixed_batch_is_known(tmp_path: Path) -> None:
    path = tmp_path / "fixed.onnx"
    onnx.save(build_toy_model(toy_metadata(), batch=1), path)
    with pytest.raises(ValueError, match="takes at most 1"):
        open_session(path).detect([noise(9, 9)] * 2, batch_size=2)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing.onnx", FileNotFoundError, "model not found"),
        ("missing.engine", FileNotFoundError, "model not found"),
        ("model.pt", ValueError, "unknown kind of model .*expected .onnx, .safetensors, .engine"),
        ("folder.onnx", ValueError, "is not a file"),
    ],
)
def test_paths_that_are_no_model(name: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(error, match=message):
        open_session(tmp_path / name)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9])
def test_truncated_onnx_is_one_clear_line(share: float, toy_onnx: Path) -> None:
    content = toy_onnx.read_bytes()
    toy_onnx.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"toy.onnx") as caught:
        open_session(toy_onnx)
    assert "\n" not in str(caught.value)


def test_onnx_without_metadata_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    onnx.save(build_toy_model(None), path)
    with pytest.raises(ValueError, match=r"foreign.onnx: not an asag model"):
        open_session(path)


def test_onnx_that_breaks_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    onnx.save(build_toy_model(toy_metadata(input_height=32)), path)
    with pytest.raises(ValueError, match="the metadata say uint8"):
        open_session(path)
    model = build_toy_model(toy_metadata())
    del model.graph.output[3]
    onnx.save(model, path)
    with pytest.raises(ValueError, match="not an asag model: inputs"):
        open_session(path)


def test_options_that_do_not_fit(toy_onnx: Path) -> None:
    with pytest.raises(ValueError, match="is fp32, not fp16"):
        open_session(toy_onnx, precision="fp16")
    with pytest.raises(ValueError, match="fixed in the file"):
        open_session(toy_onnx, input_size=(HEIGHT, WIDTH))
    with pytest.raises(ValueError, match="number of threads"):
        open_session(toy_onnx, threads=0)
    assert open_session(toy_onnx, precision="fp32").precision == "fp32"


@pytest.mark.parametrize("device", ["gpu", "cpu:0", "cuda:", "cuda:x", "", "cuda:-1", "tensorrt:", "tensorrt-rtx"])
def test_unknown_devices(device: str) -> None:
    with pytest.raises(ValueError, match="unknown device"):
        check_device(device)
    assert check_device("cuda:1") == ("cuda", 1)
    assert check_device("tensorrt:2") == ("tensorrt", 2)


@pytest.mark.parametrize(("device", "provider"), [("cuda", "CUDA"), ("tensorrt", "Tensorrt")])
def test_a_provider_that_is_missing_is_not_replaced(device: str, provider: str, toy_onnx: Path) -> None:
    import onnxruntime

    if f"{provider}ExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {provider}")
    with pytest.raises(BackendUnavailableError, match=rf"(?i)this ONNX Runtime has no {provider}: pip install"):
        open_session(toy_onnx, device=device)


@pytest.mark.parametrize("device", ["cuda:1", "tensorrt:1"])
def test_a_provider_that_does_not_start_is_not_replaced(
    device: str, toy_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime is told what a machine with the provider's library but no GPU tells it, and goes on with the CPU."""
    import onnxruntime

    asked: list[Any] = []
    names = {"cuda:1": "CUDAExecutionProvider", "tensorrt:1": "TensorrtExecutionProvider"}
    genuine = onnxruntime.InferenceSession

    def on_the_cpu(path: str, options: Any, providers: list[Any], **others: Any) -> Any:
        asked.extend(providers)
        return genuine(path, options, providers=["CPUExecutionProvider"], **others)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*names.values(), "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_the_cpu)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(BackendUnavailableError, match=f"could not start its {names[device]}; check the NVIDIA driver"):
        open_session(toy_onnx, device=device)
    chosen = dict(provider for provider in asked if isinstance(provider, tuple))
    assert next(iter(chosen)) == names[device]
    assert chosen["CUDAExecutionProvider"] == {"device_id": 1, "use_tf32": 0}
    if device == "tensorrt:1":
        assert not chosen[names[device]]["trt_fp16_enable"]
        assert not chosen[names[device]]["trt_engine_cache_enable"]


def test_the_tensorrt_device_is_for_exported_files(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.engine"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=r"does not run on the device tensorrt, which is for \.onnx files"):
            open_session(tmp_path / name, device="tensorrt")


def test_threads_share_a_session(toy_onnx: Path) -> None:
    images = [noise(30 + number, 50, number) for number in range(12)]
    with open_session(toy_onnx, threads=1) as session:
        expected = [session.detect(images[start:], batch_size=3) for start in range(4)]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                found = pool.map(lambda start: session.detect(images[start:], batch_size=3), range(4))
                for ours, theirs in zip(found, expected, strict=True):
                    assert len(ours) == len(theirs)
                    assert all(np.array_equal(a.scores, b.scores) for a, b in zip(ours, theirs, strict=True))
                    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(ours, theirs, strict=True))


class SlowSession(ToySession):
    """Works on three batches at once, each of which takes until its result is asked for."""

    batches_in_flight = 3

    def __init__(self) -> None:
        super().__init__()
        self.waiting = 0
        self.most_waiting = 0

    def submit(self, tensors: Mapping[str, NDArray]) -> Pending:
        session = self
        session.waiting += 1
        session.most_waiting = max(session.most_waiting, session.waiting)

        class Waiting(Pending):
            def result(self) -> dict[str, NDArray]:
                session.waiting -= 1
                return session.run(tensors)

        return Waiting()


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 12])
def test_batches_in_flight_keep_their_order(count: int, tmp_path: Path) -> None:
    images: list[Any] = [noise(30 + number, 50, number) for number in range(count)]
    for bad in (0, 3, 4):
        images[bad : bad + 1] = [tmp_path / "missing.png"] if bad < count else []
    session, failed = SlowSession(), []
    found = session.detect(images, batch_size=2, on_error=lambda name, error: failed.append(name))
    expected = ToySession().detect(images, batch_size=2, on_error=lambda name, error: None)
    assert [each.scores.tolist() for each in found] == [each.scores.tolist() for each in expected]
    assert len(failed) == sum(bad < count for bad in (0, 3, 4))
    assert session.waiting == 0
    assert session.most_waiting <= 3
    if count == 12:
        assert session.most_waiting == 3


def test_public_names_are_those_of_the_session_module() -> None:
    assert open_session is asag.runtime.opening.open_session


def test_a_file_that_opens_and_does_not_run_is_one_line(tmp_path: Path) -> None:
    model = build_toy_model(toy_metadata())
    (indices,) = [tensor for tensor in model.graph.initializer if tensor.name == "swapped"]
    indices.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 0, 1, 9]), "swapped"))
    path = tmp_path / "damaged.onnx"
    onnx.save(model, path)
    with open_session(path) as session, pytest.raises(ValueError, match=r"cannot run .*damaged\.onnx") as caught:
        session.detect([noise(40, 60)])
    assert "\n" not in str(caught.value)


def test_outputs_of_a_wrong_shape_are_refused(tmp_path: Path) -> None:
    model = build_toy_model(toy_metadata())
    (node,) = [node for node in model.graph.node if node.op_type == "ReduceSum"]
    node.attribute[0].i = 1
    model.graph.output[3].type.tensor_type.ClearField("shape")
    path = tmp_path / "damaged.onnx"
    onnx.save(model, path)
    with open_session(path) as session, pytest.raises(ValueError, match=r"gives overflow as int32 \[1, 1\]"):
        session.detect([noise(40, 60)])
