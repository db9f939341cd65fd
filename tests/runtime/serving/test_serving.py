"""Model repositories, the model of the Python backend, and the client; with tritonclient also over the protocol."""

from __future__ import annotations

import importlib
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from asag.runtime.engines.build import BuildOptions, build_engine
from asag.runtime.errors import BackendUnavailableError
from asag.runtime.metadata import ModelMetadata
from asag.runtime.preprocessing import prepare, to_rgb
from asag.runtime.serving.client import TritonSession
from asag.runtime.serving.repository import ServedModel, configuration, write_repository
from tests.runtime.toy_detector import ToySession, build_toy_model, toy_metadata

PIXELS = [np.random.default_rng(number).integers(0, 256, (40 + number, 60, 3), np.uint8) for number in range(5)]


def test_repository_of_an_exported_file(toy_onnx: Path, tmp_path: Path) -> None:
    folder = write_repository(toy_onnx, tmp_path / "repo", threads=3, instances=2, max_batch=6)
    assert folder == tmp_path / "repo" / "toy"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"config.pbtxt", "labels.txt", "warmup/sizes", "1/model.onnx"}
    assert (folder / "1" / "model.onnx").read_bytes() == toy_onnx.read_bytes()
    assert (folder / "labels.txt").read_text() == "1 circle\n3 square\n7 ring\n"
    assert np.frombuffer((folder / "warmup" / "sizes").read_bytes(), np.float32).tolist() == [64, 96]
    assert sorted(path.name for path in (tmp_path / "repo").iterdir()) == ["toy"]
    with pytest.raises(ValueError, match="exists; remove it"):
        write_repository(toy_onnx, tmp_path / "repo")


def test_repository_of_an_engine(toy_onnx: Path, tmp_path: Path) -> None:
    try:
        engine = build_engine(toy_onnx, tmp_path / "toy.engine", BuildOptions(batch=(1, 4))).engine_path
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    folder = write_repository(engine, tmp_path / "repo", name="fast")
    assert {path.name for path in (folder / "1").iterdir()} == {"model.engine", "model.engine.json", "model.py"}
    text = (folder / "config.pbtxt").read_text()
    assert 'backend: "python"' in text
    assert "max_batch_size: 4\n" in text
    assert "preferred_batch_size: [4]" in text
    assert "KIND_GPU" in text
    assert "reshape" not in text
    with pytest.raises(ValueError, match="takes at most 4 images at once, not 5"):
        write_repository(engine, tmp_path / "other", max_batch=5)
    engine.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        write_repository(engine, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_wrong_use_is_refused(toy_onnx: Path, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed.onnx"
    onnx.save(build_toy_model(toy_metadata(), batch=1), fixed)
    for model, options, message in (
        (fixed, {}, "fixed batch of 1"),
        (toy_onnx, {"name": "../x"}, "is no name for a served model"),
        (toy_onnx, {"device": "tpu"}, "unknown device"),
        (tmp_path / "x.safetensors", {}, "expected .onnx or .engine"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            write_repository(model, tmp_path / "repo", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "repo").exists()


def configured(backend: str, metadata: ModelMetadata, tuned: tuple[int, ...] = ()) -> str:
    model = ServedModel(Path("toy.onnx"), metadata, backend, 8, tuned)
    return configuration(model, "toy", on_gpu=True, instances=2, queue_delay_us=500, threads=3)


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_the_configuration_is_valid_in_the_servers_schema(backend: str) -> None:
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")
    text_format = importlib.import_module("google.protobuf.text_format")
    names = ('a "quoted" name', "line\nbreak", "Ähre")
    metadata = toy_metadata(category_names=names, input_type="float32")
    parsed = text_format.Parse(configured(backend, metadata, (1, 4)), schema.ModelConfig())
    assert (parsed.name, parsed.backend, parsed.max_batch_size) == ("toy", backend, 8)
    assert [(value.name, value.data_type, list(value.dims)) for value in parsed.input] == [
        ("images", schema.TYPE_FP32, [3, 64, 96]),
        ("sizes", schema.TYPE_FP32, [2]),
    ]
    assert [(value.name, value.data_type, list(value.dims)) for value in parsed.output] == [
        ("boxes", schema.TYPE_FP32, [16, 4]),
        ("scores", schema.TYPE_FP32, [16]),
        ("labels", schema.TYPE_INT64, [16]),
        ("overflow", schema.TYPE_INT32, [1]),
    ]
    assert parsed.output[3].HasField("reshape") == (backend == "onnxruntime")
    assert (parsed.instance_group[0].count, parsed.instance_group[0].kind) == (2, schema.ModelInstanceGroup.KIND_GPU)
    assert parsed.dynamic_batching.max_queue_delay_microseconds == 500
    assert list(parsed.dynamic_batching.preferred_batch_size) == [4]
    assert [warmup.batch_size for warmup in parsed.model_warmup] == [1, 4, 8]
    assert parsed.model_warmup[0].inputs["sizes"].input_data_file == "sizes"
    properties = {key: value.string_value for key, value in parsed.parameters.items() if key.startswith("asag.")}
    assert ModelMetadata.from_properties(properties) == metadata
    assert ("intra_op_thread_count" in parsed.parameters) == (backend == "onnxruntime")


def test_braces_and_quotes_of_the_configuration_close() -> None:
    text = configured("onnxruntime", toy_metadata())
    assert text.count("{\n") == len(re.findall(r"^ *}$", text, re.MULTILINE))
    assert all(re.fullmatch(r' *(\w+ \{|}|\w+: (\w+|".*"|\[[\d, ]*]))', line) for line in text.splitlines())


class StandInTensor:
    def __init__(self, name: str, array: NDArray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> NDArray:
        return self.array


@pytest.fixture
def served(toy_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Python backend's model with the exported file in the engine's place."""
    stand_in = SimpleNamespace(
        get_input_tensor_by_name=lambda request, name: StandInTensor(name, request[name]),
        Tensor=StandInTensor,
        TritonError=lambda message: message,
        InferenceResponse=lambda output_tensors, error=None: (
            error or {tensor.name: tensor.array for tensor in output_tensors}
        ),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "asag.runtime.serving.model", raising=False)
    model = importlib.import_module("asag.runtime.serving.model").TritonPythonModel()
    (tmp_path / "1").mkdir()
    toy_onnx.rename(tmp_path / "1" / "model.onnx")
    place = {"model_repository": str(tmp_path), "model_version": "1"}
    model.initialize(place | {"model_instance_kind": "CPU", "model_instance_device_id": "0"})
    return model


def test_requests_share_a_batch_and_get_their_parts(served: Any) -> None:
    sizes = (1, 3, 1)
    everything = prepare([to_rgb(Image.fromarray(pixels)) for pixels in PIXELS], toy_metadata())
    ends = np.cumsum(sizes)
    requests = [
        {name: array[end - size : end] for name, array in everything.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]
    answers = served.execute(requests)
    expected = ToySession().run(everything)
    assert [len(answer["scores"]) for answer in answers] == list(sizes)
    for name in ("boxes", "scores", "labels"):
        together = np.concatenate([answer[name] for answer in answers])
        assert np.allclose(together, expected[name], atol=1e-4)
    assert answers[1]["overflow"].shape == (3, 1)
    requests[0]["images"] = requests[0]["images"][:, :, :10]
    requests[1:] = []
    (failure,) = served.execute(requests)
    assert isinstance(failure, str)
    served.finalize()


def grpc_server() -> tuple[Any, int]:
    """A server that speaks the protocol, with the toy detector behind it and the configuration that we write."""
    grpc = importlib.import_module("grpc")
    service = importlib.import_module("tritonclient.grpc.service_pb2")
    stubs = importlib.import_module("tritonclient.grpc.service_pb2_grpc")
    schema = importlib.import_module("tritonclient.grpc.model_config_pb2")
    text_format = importlib.import_module("google.protobuf.text_format")
    types = {"UINT8": np.uint8, "FP32": np.float32}
    names = {"float32": "FP32", "int64": "INT64", "int32": "INT32"}

    class Service(stubs.GRPCInferenceServiceServicer):  # type: ignore[name-defined,misc]
        def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802 (the protocol's name)
            if request.name != "toy":
                context.abort(grpc.StatusCode.NOT_FOUND, "unknown model")
            text = configured("onnxruntime", toy_metadata())
            return service.ModelConfigResponse(config=text_format.Parse(text, schema.ModelConfig()))

        def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 (the protocol's name)
            tensors = {
                value.name: np.frombuffer(content, types[value.datatype]).reshape(tuple(value.shape))
                for value, content in zip(request.inputs, request.raw_input_contents, strict=True)
            }
            answer = service.ModelInferResponse(model_name="toy", model_version="1")
            for name, array in ToySession().run(tensors).items():
                given = array.astype({"float64": "float32"}.get(array.dtype.name, array.dtype.name))
                given = given.reshape(-1, 1) if given.ndim == 1 else given
                answer.outputs.add(name=name, datatype=names[given.dtype.name], shape=given.shape)
                answer.raw_output_contents.append(given.tobytes())
            return answer

    server = grpc.server(ThreadPoolExecutor(2))
    stubs.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port


def test_a_served_model_is_a_session() -> None:
    pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    server, port = grpc_server()
    try:
        with TritonSession(f"127.0.0.1:{port}", "toy", "grpc") as session:
            assert (session.backend, session.max_batch, session.metadata) == ("triton-grpc", 8, toy_metadata())
            for found, expected in zip(session.detect(PIXELS, 2), ToySession().detect(PIXELS), strict=True):
                assert np.allclose(found.scores, expected.scores, atol=1e-6)
                assert np.array_equal(found.labels, expected.labels)
                assert np.allclose(found.boxes, expected.boxes, atol=1e-4)
        with pytest.raises(BackendUnavailableError, match=r"no model other at .*unknown model"):
            TritonSession(f"127.0.0.1:{port}", "other", "grpc")
    finally:
        server.stop(None)


def http_server() -> ThreadingHTTPServer:
    """The same over HTTP: JSON first, the tensors' bytes after it."""
    types = {"UINT8": np.uint8, "FP32": np.float32}
    names = {"float32": "FP32", "int64": "INT64", "int32": "INT32"}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def answer(self, content: bytes, header: int | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            if header is not None:
                self.send_header("Inference-Header-Content-Length", str(header))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            assert self.path == "/v2/models/toy/config"
            parameters = {key: {"string_value": value} for key, value in toy_metadata().to_properties().items()}
            self.answer(json.dumps({"max_batch_size": 8, "backend": "onnxruntime", "parameters": parameters}).encode())

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            place = int(self.headers["Inference-Header-Content-Length"])
            tensors = {}
            for value in json.loads(content[:place])["inputs"]:
                size = value["parameters"]["binary_data_size"]
                array = np.frombuffer(content[place : place + size], types[value["datatype"]])
                tensors[value["name"]] = array.reshape(value["shape"])
                place += size
            outputs, parts = [], []
            for name, array in ToySession().run(tensors).items():
                given = array.astype({"float64": "float32"}.get(array.dtype.name, array.dtype.name))
                given = given.reshape(-1, 1) if given.ndim == 1 else given
                described = {"name": name, "datatype": names[given.dtype.name], "shape": list(given.shape)}
                outputs.append(described | {"parameters": {"binary_data_size": given.nbytes}})
                parts.append(given.tobytes())
            header = json.dumps({"model_name": "toy", "model_version": "1", "outputs": outputs}).encode()
            self.answer(header + b"".join(parts), len(header))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_the_same_over_http() -> None:
    pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    server = http_server()
    try:
        url = f"127.0.0.1:{server.server_port}"
        with TritonSession(url, "toy") as session:
            assert (session.backend, session.max_batch, session.metadata) == ("triton-http", 8, toy_metadata())
            for found, expected in zip(session.detect(PIXELS, 2), ToySession().detect(PIXELS), strict=True):
                assert np.allclose(found.scores, expected.scores, atol=1e-6)
                assert np.array_equal(found.labels, expected.labels)
                assert np.allclose(found.boxes, expected.boxes, atol=1e-4)
        with pytest.raises(BackendUnavailableError, match="no model other at"):
            TritonSession(url, "other")
    finally:
        server.shutdown()


def test_the_client_librarys_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client library's calls, answered in the process; the configuration as the server's JSON has it."""
    parameters = {key: {"string_value": value} for key, value in toy_metadata().to_properties().items()}

    class Client:
        def __init__(self, url: str) -> None:
            assert url == "host:8000"

        def get_model_config(self, model: str) -> dict[str, Any]:
            return json.loads(json.dumps({"max_batch_size": 8, "backend": "onnxruntime", "parameters": parameters}))

        def infer(self, model: str, inputs: list[Any], outputs: list[Any]) -> Any:
            found = ToySession().run({value.name: value.array for value in inputs})
            found["overflow"] = found["overflow"].reshape(-1, 1)
            return SimpleNamespace(as_numpy=found.__getitem__)

        def close(self) -> None: ...

    class Input:
        def __init__(self, name: str, shape: list[int], kind: str) -> None:
            self.name, self.shape, self.kind = name, shape, kind

        def set_data_from_numpy(self, array: NDArray) -> None:
            assert (list(array.shape), array.dtype) == (self.shape, {"UINT8": np.uint8, "FP32": np.float32}[self.kind])
            self.array = array

    library = SimpleNamespace(InferenceServerClient=Client, InferInput=Input, InferRequestedOutput=lambda name: name)
    monkeypatch.setitem(sys.modules, "tritonclient.http", library)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "tritonclient", SimpleNamespace(http=library))  # type: ignore[arg-type]
    with TritonSession("host:8000", "toy") as session:
        assert (session.backend, session.max_batch) == ("triton-http", 8)
        for found, expected in zip(session.detect(PIXELS, 3), ToySession().detect(PIXELS), strict=True):
            assert np.allclose(found.boxes, expected.boxes)


def test_without_the_client_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.http", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'tritonclient\[http\]'"):
        TritonSession("host:8000", "toy")
    with pytest.raises(ValueError, match="unknown protocol"):
        TritonSession("host:8000", "toy", "smoke")
