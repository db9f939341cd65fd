"""Building TensorRT-RTX engines from exported ONNX files; the builder needs no GPU.

TensorRT-RTX has no custom plugins, so the model-local functions of domain ``asag`` are inlined into standard operators
first. The engine is strongly typed: every tensor keeps the type that the ONNX file gives it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtime.engine_backend import TENSORRT_RTX, captured_logger
from runtime.engine_manifest import EngineManifest, Profile, batch_profiles, manifest_path
from runtime.errors import BackendUnavailableError, one_line
from runtime.files import atomic_path, write_json, write_text
from runtime.metadata import ModelMetadata

ProgressCallback = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class BuildResult:
    """A finished build: the engine's path, its manifest, its size in bytes and the build time in seconds."""

    engine_path: Path
    manifest: EngineManifest
    engine_bytes: int
    seconds: float
    warnings: tuple[str, ...]


def build_engine(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    batch: Sequence[int] = (1, 4),
    progress: ProgressCallback | None = None,
    targets: Sequence[str] = (),
    log_path: str | os.PathLike[str] | None = None,
) -> BuildResult:
    """Build an engine from an exported ONNX file and write it with its manifest.

    ``batch`` are the batch sizes to tune for, each with an optimization profile of its own (see
    :func:`runtime.engine_manifest.batch_profiles`); height and width are those of the file. ``targets`` are GPU
    architectures ("sm_86"); the default runs on compute capability 8.0 and later. ``progress`` is called with the
    phase's name and the fraction done (0..1). All that the builder says goes to ``log_path``, also when it fails. The
    engine appears at ``engine_path`` whole or not at all, after its manifest.

    Raises FileNotFoundError or ValueError for an input that is missing, damaged or not an asag model, ValueError with
    the builder's first error where it refuses the network, and BackendUnavailableError without TensorRT-RTX.
    """
    profiles = batch_profiles(batch)
    unknown = [target for target in targets if target not in TENSORRT_RTX.targets]
    if unknown:
        raise ValueError(
            f"unknown GPU architecture {unknown[0]!r}; TensorRT-RTX builds for {', '.join(TENSORRT_RTX.targets)}"
        )
    onnx_path, engine_path = Path(onnx_path), Path(engine_path)
    if engine_path.suffix.lower() != ".engine":
        raise ValueError(f"name the engine with the suffix .engine, not {engine_path.name}")
    tensorrt_rtx = TENSORRT_RTX.load()
    started = time.perf_counter()
    _report(progress, "inlining functions", 0.0)
    content, inlined, metadata, fixed_batch = _inlined_model(onnx_path)
    if fixed_batch is not None:
        if tuple(batch) != (fixed_batch,):
            raise ValueError(
                f"{onnx_path} has a fixed batch of {fixed_batch}: build it with --batch {fixed_batch}, or export it"
                " with a dynamic batch"
            )
        profiles = ((fixed_batch,) * 3,)
    logger = captured_logger(tensorrt_rtx, all_lines=log_path is not None)
    try:
        parsed = _parse(tensorrt_rtx, logger, inlined, onnx_path, progress)
        layers, layer_types = _count_layers(parsed.network)
        choice = _Choice(metadata.input_size, profiles, tuple(targets))
        engine = _build(tensorrt_rtx, logger, parsed, onnx_path, choice=choice, progress=progress)
    finally:
        if log_path is not None:
            write_text(log_path, "".join(f"{line}\n" for line in logger.lines))
    manifest = EngineManifest(
        backend=TENSORRT_RTX.name,
        version=tensorrt_rtx.__version__,
        precision=metadata.precision,
        profiles=profiles,
        targets=tuple(targets),
        tf32=False,
        op_lowering=TENSORRT_RTX.op_lowering,
        onnx_name=onnx_path.name,
        onnx_sha256=hashlib.sha256(content).hexdigest(),
        engine_sha256=hashlib.sha256(engine).hexdigest(),
        layers=layers,
        layer_types=layer_types,
        metadata=metadata,
    )
    # The engine replaces an older one last: the digest tells a manifest that no longer, or not yet, fits its engine.
    with atomic_path(engine_path) as temporary:
        temporary.write_bytes(engine)
        write_json(manifest_path(engine_path), manifest.to_json())
    return BuildResult(engine_path, manifest, len(engine), time.perf_counter() - started, tuple(logger.warnings))


def _inlined_model(onnx_path: Path) -> tuple[bytes, bytes, ModelMetadata, int | None]:
    """The file's bytes, the model with its functions inlined, its metadata, and a fixed batch size or None."""
    try:
        import onnx
        import onnx.checker
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
        _check_names(model)
        metadata = ModelMetadata.from_properties({item.key: item.value for item in model.metadata_props})
        fixed_batch = _fixed_batch(model, metadata)
        inlined = onnx.inliner.inline_local_functions(model)
        left = sorted({node.op_type for node in inlined.graph.node if node.domain == "asag"})
        if left:
            raise ValueError(f"operators {', '.join(left)} have no function body in the file; export it again")
        try:
            # The builder's parser takes a graph at its word; one that is not sound can end the process.
            onnx.checker.check_model(inlined, full_check=True)
        except Exception as error:  # checker and inference have exception classes of their own
            raise ValueError(f"damaged, export it again with `asag export`: {one_line(error)}") from None
        return content, inlined.SerializeToString(), metadata, fixed_batch
    except ValueError as error:
        raise ValueError(f"{onnx_path}: {one_line(error)}") from None


def _check_names(model: Any) -> None:
    """Raise ValueError for names that are no text: the parser would print them to the terminal's dismay."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    values = (*model.graph.input, *model.graph.output, *model.graph.initializer, *model.graph.value_info)
    names = [value.name for value in values]
    for node in nodes:
        names += (node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute))
    # The reader gives what is not UTF-8 as bytes.
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name in the file is no text, it is damaged; export it again with `asag export`")


def _fixed_batch(model: Any, metadata: ModelMetadata) -> int | None:
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    if set(shapes) != {"images", "sizes"}:
        raise ValueError(f"not an asag model: its inputs are {sorted(shapes)} instead of images and sizes")
    found = [dimension.dim_value for dimension in shapes["images"]][1:]
    if found != [3, *metadata.input_size]:
        raise ValueError(f"input images is {found} per image, but the metadata say {[3, *metadata.input_size]}")
    return shapes["images"][0].dim_value or None


@dataclasses.dataclass(frozen=True)
class _Parsed:
    """A parsed network with what must outlive it."""

    builder: Any
    network: Any
    parser: Any


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What a build is for: (height, width) of the input in pixels, batches, GPU architectures."""

    input_size: tuple[int, int]
    profiles: tuple[Profile, ...]
    targets: tuple[str, ...]


def _parse(tensorrt_rtx: Any, logger: Any, model: bytes, onnx_path: Path, progress: ProgressCallback | None) -> _Parsed:
    builder = tensorrt_rtx.Builder(logger)
    network = builder.create_network(1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt_rtx.OnnxParser(network, logger)
    _report(progress, "parsing", 0.0)
    if not parser.parse(model):
        reasons = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        reason = (reasons + logger.errors + ["no reason was given"])[0]
        raise ValueError(f"TensorRT-RTX cannot parse {onnx_path}: {reason}")
    return _Parsed(builder, network, parser)


def _count_layers(network: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Layers by type, and their first outputs by element type, most frequent first."""
    layers, types = Counter[str](), Counter[str]()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        layers[layer.type.name.lower()] += 1
        if layer.num_outputs:
            types[layer.get_output(0).dtype.name.lower()] += 1
    return dict(layers.most_common()), dict(types.most_common())


def _build(
    tensorrt_rtx: Any,
    logger: Any,
    parsed: _Parsed,
    onnx_path: Path,
    *,
    choice: _Choice,
    progress: ProgressCallback | None,
) -> bytes:
    """The serialized engine."""
    config = parsed.builder.create_builder_config()
    config.clear_flag(tensorrt_rtx.BuilderFlag.TF32)
    # What `asag inspect` shows of an engine where a GPU can open it.
    config.profiling_verbosity = tensorrt_rtx.ProfilingVerbosity.DETAILED
    for batches in choice.profiles:
        profile = parsed.builder.create_optimization_profile()
        for name, rest in (("images", (3, *choice.input_size)), ("sizes", (2,))):
            profile.set_shape(name, *((size, *rest) for size in batches))
        config.add_optimization_profile(profile)
    if choice.targets:
        config.num_compute_capabilities = len(choice.targets)
        for index, target in enumerate(choice.targets):
            config.set_compute_capability(
                getattr(tensorrt_rtx.ComputeCapability, target.upper().replace("_", "")), index
            )
    if progress is not None:
        # Kept in a local name: the monitor must outlive the build.
        monitor = _progress_monitor(tensorrt_rtx, progress)
        config.progress_monitor = monitor
    serialized = parsed.builder.build_serialized_network(parsed.network, config)
    if serialized is None:
        reason = [*logger.errors, "no reason was given"][0]
        raise ValueError(f"TensorRT-RTX cannot build {onnx_path}: {reason}")
    _report(progress, "built", 1.0)
    return bytes(serialized)


def _parser_error(error: Any) -> str:
    place = f" (node {error.node_name()}, {error.node_operator()})" if error.node_name() else ""
    return " ".join(error.desc().split()) + place


def _report(progress: ProgressCallback | None, phase: str, fraction: float) -> None:
    if progress is not None:
        progress(phase, fraction)


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
