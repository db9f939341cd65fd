"""Building engines from exported ONNX files, with TensorRT for the GPU at hand or with TensorRT for RTX without one.

Engines are strongly typed: every tensor keeps the type that the ONNX file gives it. TensorRT embeds the kernels of the
`asag` ops as plugins; TensorRT for RTX has none, so there the ops' bodies of standard operators are inlined.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asag.runtime.engines.backend import TENSORRT_RTX, EngineBackend, captured_logger
from asag.runtime.engines.layers import BuildMessages
from asag.runtime.engines.manifest import EngineManifest, Profile, batch_profiles, manifest_path
from asag.runtime.engines.network import Network, SourceModel, parse_network, read_source, with_plugins
from asag.runtime.errors import BackendUnavailableError, one_line
from asag.runtime.files import atomic_path, write_bytes, write_json, write_text

ProgressCallback = Callable[[str, float], None]

OP_LOWERINGS = ("plugins", "inlined")
"""What may become of the `asag` ops: kernels inside the engine, or standard operators."""


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    ``batch`` are the batch sizes to tune for, rising, each with an optimization profile of its own (see
    :func:`runtime.engines.manifest.batch_profiles`). ``targets`` are GPU architectures ("sm_86"): for TensorRT-RTX any
    that it knows, by default compute capability 8.0 and later; TensorRT builds for the GPU at hand, and a target only
    asserts that it is this one. ``op_lowering`` is one of OP_LOWERINGS, by default the backend's own. ``workspace_mib``
    limits what a layer may use as scratch memory, in MiB. ``tf32`` lets float32 products be rounded to TF32.
    ``timing_cache`` is a file of kernel timings that is read where it exists and written after the build.
    """

    backend: EngineBackend = TENSORRT_RTX
    batch: tuple[int, ...] = (1, 4)
    targets: tuple[str, ...] = ()
    op_lowering: str | None = None
    workspace_mib: int | None = None
    tf32: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        batch_profiles(self.batch)
        backend = self.backend
        unknown = [target for target in self.targets if target not in backend.targets]
        if unknown:
            known = ", ".join(backend.targets)
            raise ValueError(f"unknown GPU architecture {unknown[0]!r}; {backend.title} builds for {known}")
        if self.op_lowering is not None and self.op_lowering not in OP_LOWERINGS:
            raise ValueError(f"unknown op lowering {self.op_lowering!r}; choose one of {', '.join(OP_LOWERINGS)}")
        if self.lowering == "plugins" and backend.op_lowering != "plugins":
            raise ValueError(f"{backend.title} has no plugins; its ops are inlined, or build with the backend tensorrt")
        if self.timing_cache is not None and backend.portable:
            raise ValueError(
                f"{backend.title} keeps no timing cache: it chooses kernels on the GPU when an engine first runs"
            )

    @property
    def lowering(self) -> str:
        """What becomes of the ops."""
        return self.op_lowering or self.backend.op_lowering


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
    options: BuildOptions | None = None,
    progress: ProgressCallback | None = None,
    log_path: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | None = None,
) -> BuildResult:
    """Build an engine from an exported ONNX file and write it with its manifest.

    Height and width are those of the file. ``progress`` is called with the phase's name and the fraction done (0..1).
    All that the builder says goes to ``log_path``, also when it fails. ``source`` is the user's file where
    ``onnx_path`` is a converted copy of it; the manifest then names it and its digest. The engine appears at
    ``engine_path`` whole or not at all, after its manifest.

    Raises FileNotFoundError or ValueError for an input that is missing, damaged or not an asag model, ValueError with
    the builder's first error where it refuses the network, and BackendUnavailableError where the backend is not
    installed or lacks the GPU that it builds for.
    """
    options = options or BuildOptions()
    backend = options.backend
    onnx_path, engine_path = Path(onnx_path), Path(engine_path)
    targets = check_build(engine_path, options)
    module = backend.load()
    started = time.perf_counter()
    report = progress or (lambda phase, fraction: None)
    report("reading", 0.0)
    named = onnx_path if source is None else Path(source)
    model = dataclasses.replace(read_source(onnx_path), path=named)
    content = model.content if source is None else named.read_bytes()
    profiles = _profiles(model, options.batch)
    lowered, plugins = (model.inlined, {}) if options.lowering == "inlined" else with_plugins(model)
    if plugins:
        _register_plugins(targets[0])
    messages = BuildMessages(keep_all=log_path is not None)
    logger = captured_logger(module, messages)
    try:
        report("parsing", 0.0)
        network = parse_network(backend, module, logger, lowered.SerializeToString(), named)
        layers, layer_types = network.count_layers()
        engine = _serialize(module, logger, network, model, profiles, options, report)
    finally:
        if log_path is not None:
            write_text(log_path, "".join(f"{line}\n" for line in messages.lines))
    manifest = EngineManifest(
        backend=backend.name,
        version=module.__version__,
        precision=model.metadata.precision,
        profiles=profiles,
        targets=targets,
        tf32=options.tf32,
        op_lowering=options.lowering,
        onnx_name=named.name,
        onnx_sha256=hashlib.sha256(content).hexdigest(),
        engine_sha256=hashlib.sha256(engine).hexdigest(),
        layers=layers,
        layer_types=layer_types,
        metadata=model.metadata,
        plugins=plugins,
        engine_layers=messages.engine_layers(model.operators()),
    )
    # The engine replaces an older one last: the digest tells a manifest that no longer, or not yet, fits its engine.
    with atomic_path(engine_path, ".partial") as temporary:
        temporary.write_bytes(engine)
        write_json(manifest_path(engine_path), manifest.to_json())
    return BuildResult(engine_path, manifest, len(engine), time.perf_counter() - started, tuple(logger.warnings))


def check_build(engine_path: Path, options: BuildOptions) -> tuple[str, ...]:
    """The GPU architectures that the engine will be for; empty for a backend's default.

    Raises what :func:`build_engine` raises, as far as it can be known without the model.
    """
    if engine_path.suffix.lower() != ".engine":
        raise ValueError(f"name the engine with the suffix .engine, not {engine_path.name}")
    options.backend.load()
    return options.targets if options.backend.portable else (_gpu_at_hand(options.backend, options.targets),)


def _profiles(model: SourceModel, batch: tuple[int, ...]) -> tuple[Profile, ...]:
    fixed = model.fixed_batch
    if fixed is None:
        return batch_profiles(batch)
    if batch != (fixed,):
        raise ValueError(
            f"{model.path} has a fixed batch of {fixed}: build it with --batch {fixed}, or export it with a dynamic"
            " batch"
        )
    return ((fixed, fixed, fixed),)


def _gpu_at_hand(backend: EngineBackend, wanted: tuple[str, ...]) -> str:
    """The architecture of the current GPU; ValueError where another one is wanted."""
    from asag.trt_plugins.launch import current_capability

    try:
        target = f"sm_{current_capability()}"
    except ValueError as error:
        reason = one_line(error, 120)
        raise BackendUnavailableError(
            f"{backend.title} builds on the GPU that the engine is for, and none is at hand: {reason}"
        ) from None
    if wanted and wanted != (target,):
        raise ValueError(
            f"{backend.title} builds for the GPU at hand, {target}; build for {', '.join(wanted)} on such a GPU"
        )
    return target


def _register_plugins(target: str) -> None:
    from asag.trt_plugins.plugins import register_plugins

    register_plugins(int(target.removeprefix("sm_")))


def _serialize(
    module: Any,
    logger: Any,
    network: Network,
    model: SourceModel,
    profiles: tuple[Profile, ...],
    options: BuildOptions,
    progress: ProgressCallback,
) -> bytes:
    """The finished engine; writes the timing cache."""
    config = network.builder.create_builder_config()
    (config.set_flag if options.tf32 else config.clear_flag)(module.BuilderFlag.TF32)
    # What `asag inspect` shows of an engine.
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    for batches in profiles:
        profile = network.builder.create_optimization_profile()
        for name, rest in (("images", (3, *model.metadata.input_size)), ("sizes", (2,))):
            profile.set_shape(name, *((size, *rest) for size in batches))
        config.add_optimization_profile(profile)
    if options.backend.portable and options.targets:
        config.num_compute_capabilities = len(options.targets)
        for index, target in enumerate(options.targets):
            capability = getattr(module.ComputeCapability, target.upper().replace("_", ""))
            config.set_compute_capability(capability, index)
    # Kept in local names: the timings and the monitor must outlive the build.
    timings = None if options.timing_cache is None else _load_timings(config, options.backend, options.timing_cache)
    monitor = _progress_monitor(module, progress)
    config.progress_monitor = monitor
    serialized = network.builder.build_serialized_network(network.definition, config)
    if serialized is None:
        reason = [*logger.errors, "no reason was given"][0]
        advice = "" if options.workspace_mib is None else "; a larger workspace may help"
        raise ValueError(f"{options.backend.title} cannot build {model.path}: {reason}{advice}")
    if options.timing_cache is not None and timings is not None:
        write_bytes(options.timing_cache, bytes(timings.serialize()))
    progress("built", 1.0)
    return bytes(serialized)


def _load_timings(config: Any, backend: EngineBackend, path: Path) -> Any:
    """The timing cache that the build uses and adds to: the file's, or an empty one where there is no such file yet."""
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise ValueError(
            f"{path} holds no timings of this version of {backend.title} on this GPU; remove it or name another file"
        )
    return cache


def _progress_monitor(module: Any, progress: ProgressCallback) -> Any:
    """Pass the steps of the builder's outermost phase on to ``progress``."""

    class Monitor(module.IProgressMonitor):
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
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
