"""Building TensorRT-RTX engines from exported ONNX files; the builder needs no GPU.

TensorRT-RTX has no custom plugins, so the model-local functions of domain ``asag`` are inlined into standard operators
first. The engine is strongly typed: every tensor keeps the type that the ONNX file gives it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.errors import BackendUnavailableError, one_line
from runtime.files import atomic_path, write_json
from runtime.metadata import ModelMetadata

BACKEND = "tensorrt-rtx"
MANIFEST_FORMAT = 1

# Compute capabilities of the GPUs that TensorRT-RTX runs on (Turing, Ampere, Ada, Blackwell RTX).
RTX_COMPUTE_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))

ProgressCallback = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class EngineManifest:
    """What an engine was built from, kept as JSON beside it (``model.engine.json``).

    ``profile`` is the (smallest, preferred, largest) batch; the digests are SHA-256 of the files' bytes.
    """

    backend: str
    version: str
    precision: str
    profile: tuple[int, int, int]
    tf32: bool
    onnx_name: str
    onnx_sha256: str
    engine_sha256: str
    metadata: ModelMetadata

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values; the model's metadata as the properties of its ONNX file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["profile"] = list(self.profile)
        return {"format": MANIFEST_FORMAT, **values, "metadata": self.metadata.to_properties()}


@dataclasses.dataclass(frozen=True)
class BuildResult:
    """A finished build: the engine's path, its manifest, its size in bytes and the build time in seconds."""

    engine_path: Path
    manifest: EngineManifest
    engine_bytes: int
    seconds: float
    warnings: tuple[str, ...]


def manifest_path(engine_path: str | os.PathLike[str]) -> Path:
    """Path of the manifest beside an engine."""
    return Path(f"{os.fspath(engine_path)}.json")


def import_tensorrt_rtx() -> Any:
    """The TensorRT-RTX module; BackendUnavailableError with the way to install it when it is not there."""
    try:
        import tensorrt_rtx_bindings
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            "TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"
            f" ({one_line(error, 120)})"
        ) from None
    return tensorrt_rtx_bindings


def build_engine(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    batch: tuple[int, int, int] = (1, 1, 4),
    progress: ProgressCallback | None = None,
) -> BuildResult:
    """Build an engine from an exported ONNX file and write it with its manifest.

    ``batch`` is the (smallest, preferred, largest) batch size; height and width are those of the file. ``progress`` is
    called with the phase's name and the fraction done (0..1). The engine appears at ``engine_path`` whole or not at
    all, after its manifest.

    Raises FileNotFoundError or ValueError for an input that is missing, damaged or not an asag model, ValueError with
    the builder's first error where it refuses the network, and BackendUnavailableError without TensorRT-RTX.
    """
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise ValueError(f"batch sizes must rise from at least 1 (smallest, preferred, largest), they are {batch}")
    onnx_path, engine_path = Path(onnx_path), Path(engine_path)
    if engine_path.suffix.lower() != ".engine":
        raise ValueError(f"name the engine with the suffix .engine, not {engine_path.name}")
    tensorrt_rtx = import_tensorrt_rtx()
    started = time.perf_counter()
    _report(progress, "inlining functions", 0.0)
    content, inlined, metadata, fixed_batch = _inlined_model(onnx_path)
    if fixed_batch is not None and batch != (fixed_batch,) * 3:
        raise ValueError(f"{onnx_path} has a fixed batch of {fixed_batch}; export it with a dynamic batch")
    engine, warnings = _build(tensorrt_rtx, inlined, onnx_path, metadata=metadata, batch=batch, progress=progress)
    manifest = EngineManifest(
        backend=BACKEND,
        version=tensorrt_rtx.__version__,
        precision=metadata.precision,
        profile=batch,
        tf32=False,
        onnx_name=onnx_path.name,
        onnx_sha256=hashlib.sha256(content).hexdigest(),
        engine_sha256=hashlib.sha256(engine).hexdigest(),
        metadata=metadata,
    )
    # The engine replaces an older one last: the digest tells a manifest that no longer, or not yet, fits its engine.
    with atomic_path(engine_path) as temporary:
        temporary.write_bytes(engine)
        write_json(manifest_path(engine_path), manifest.to_json())
    return BuildResult(engine_path, manifest, len(engine), time.perf_counter() - started, warnings)


def read_manifest(engine_path: str | os.PathLike[str]) -> EngineManifest:
    """Read the manifest beside an engine; ValueError with the remedy when it is missing or damaged."""
    path = manifest_path(engine_path)
    remedy = "build the engine again with `asag build`"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{engine_path} has no manifest {path.name} beside it; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the manifest {path}: {one_line(error)}; {remedy}") from None
    names = [field.name for field in dataclasses.fields(EngineManifest)]
    if not isinstance(values, Mapping) or values.get("format") != MANIFEST_FORMAT:
        raise ValueError(f"{path} is not an engine manifest of this version; {remedy}")
    if any(name not in values for name in names) or not isinstance(values["metadata"], Mapping):
        raise ValueError(f"the manifest {path} is incomplete; {remedy}")
    profile = values["profile"]
    if not isinstance(profile, list) or len(profile) != 3 or not all(isinstance(size, int) for size in profile):
        raise ValueError(f"the manifest {path} holds no batch profile; {remedy}")
    try:
        metadata = ModelMetadata.from_properties(values["metadata"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    given = {name: values[name] for name in names} | {"profile": tuple(profile), "metadata": metadata}
    return EngineManifest(**given)


def _inlined_model(onnx_path: Path) -> tuple[bytes, bytes, ModelMetadata, int | None]:
    """The file's bytes, the model with its functions inlined, its metadata, and a fixed batch size or None."""
    try:
        import onnx
        import onnx.inliner
    except ImportError:
        raise BackendUnavailableError("building an engine needs the onnx package: pip install onnx") from None

    if not onnx_path.exists():
        raise FileNotFoundError(f"model not found: {onnx_path}")
    try:
        content = onnx_path.read_bytes()
        model = onnx.load_model_from_string(content)
        onnx.load_external_data_for_model(model, str(onnx_path.parent))
    except Exception as error:  # protobuf and onnx raise classes of their own
        raise ValueError(
            f"cannot read {onnx_path} as ONNX, export it again with `asag export`: {one_line(error)}"
        ) from None
    try:
        metadata = ModelMetadata.from_properties({item.key: item.value for item in model.metadata_props})
        fixed_batch = _fixed_batch(model, metadata)
        inlined = onnx.inliner.inline_local_functions(model)
        left = sorted({node.op_type for node in inlined.graph.node if node.domain == "asag"})
        if left:
            raise ValueError(f"operators {', '.join(left)} have no function body in the file; export it again")
        return content, inlined.SerializeToString(), metadata, fixed_batch
    except ValueError as error:
        raise ValueError(f"{onnx_path}: {one_line(error)}") from None


def _fixed_batch(model: Any, metadata: ModelMetadata) -> int | None:
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    if set(shapes) != {"images", "sizes"}:
        raise ValueError(f"not an asag model: its inputs are {sorted(shapes)} instead of images and sizes")
    found = [dimension.dim_value for dimension in shapes["images"]][1:]
    if found != [3, *metadata.input_size]:
        raise ValueError(f"input images is {found} per image, but the metadata say {[3, *metadata.input_size]}")
    return shapes["images"][0].dim_value or None


def _build(
    tensorrt_rtx: Any,
    model: bytes,
    onnx_path: Path,
    *,
    metadata: ModelMetadata,
    batch: tuple[int, int, int],
    progress: ProgressCallback | None,
) -> tuple[bytes, tuple[str, ...]]:
    """Parse and build; the serialized engine and the builder's warnings."""
    logger = captured_logger(tensorrt_rtx)
    builder = tensorrt_rtx.Builder(logger)
    network = builder.create_network(1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt_rtx.OnnxParser(network, logger)
    _report(progress, "parsing", 0.0)
    if not parser.parse(model):
        reasons = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        reason = (reasons + logger.errors + ["no reason was given"])[0]
        raise ValueError(f"TensorRT-RTX cannot parse {onnx_path}: {reason}")
    config = builder.create_builder_config()
    config.clear_flag(tensorrt_rtx.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for name, rest in (("images", (3, *metadata.input_size)), ("sizes", (2,))):
        profile.set_shape(name, *((size, *rest) for size in batch))
    config.add_optimization_profile(profile)
    if progress is not None:
        # Kept in a local name: the monitor must outlive the build.
        monitor = _progress_monitor(tensorrt_rtx, progress)
        config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        reason = [*logger.errors, "no reason was given"][0]
        raise ValueError(f"TensorRT-RTX cannot build {onnx_path}: {reason}")
    _report(progress, "built", 1.0)
    return bytes(serialized), tuple(logger.warnings)


def _parser_error(error: Any) -> str:
    place = f" (node {error.node_name()}, {error.node_operator()})" if error.node_name() else ""
    return " ".join(error.desc().split()) + place


def _report(progress: ProgressCallback | None, phase: str, fraction: float) -> None:
    if progress is not None:
        progress(phase, fraction)


def captured_logger(tensorrt_rtx: Any) -> Any:
    """A logger that keeps errors and warnings instead of printing them."""

    class CapturedLogger(tensorrt_rtx.ILogger):
        def __init__(self) -> None:
            tensorrt_rtx.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            text = " ".join(message.split())
            if severity in (tensorrt_rtx.ILogger.Severity.ERROR, tensorrt_rtx.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(text)
            elif severity == tensorrt_rtx.ILogger.Severity.WARNING:
                self.warnings.append(text)

    return CapturedLogger()


def _progress_monitor(tensorrt_rtx: Any, progress: ProgressCallback) -> Any:
    """Pass the steps of the builder's outermost phase on to ``progress``."""

    class Monitor(tensorrt_rtx.IProgressMonitor):
        def __init__(self) -> None:
            tensorrt_rtx.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._steps[phase_name] = max(1, num_steps)
                progress(phase_name, 0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                progress(phase_name, min(1.0, (step + 1) / self._steps[phase_name]))
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._steps:
                progress(phase_name, 1.0)

    return Monitor()
