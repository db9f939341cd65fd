"""The manifest beside an engine: what it was built from, for what, and which profile serves which batch."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.engines.backend import BACKENDS
from runtime.engines.layers import EngineLayers, are_counts, is_count
from runtime.errors import one_line
from runtime.metadata import ModelMetadata

MANIFEST_FORMAT = 3
REBUILD = "build the engine again: asag build MODEL.onnx -o MODEL.engine"

DEFAULT_LEAST_CAPABILITY = (8, 0)
"""What TensorRT-RTX covers when no architecture is named."""

Profile = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class EngineManifest:
    """What an engine was built from, kept as JSON beside it (``model.engine.json``).

    ``profiles`` are (smallest, preferred, largest) batches, rising and without gaps; ``targets`` the GPU architectures
    ("sm_86") that were named or, for TensorRT, that of the GPU it was built on; empty for TensorRT-RTX's default of
    compute capability 8.0 and later. ``op_lowering`` says what became of the ops of domain ``asag``: "inlined" into
    standard operators, or "plugins", counted by name in ``plugins``. ``layers`` counts the network's layers by type as
    the builder got them, before fusion, and ``layer_types`` their outputs by element type; ``engine_layers`` is what
    the builder made of them, where it said so. The ONNX digest and name are those of the user's file, also where it was
    converted to another precision first. Digests are SHA-256 of the files' bytes.
    """

    backend: str
    version: str
    precision: str
    profiles: tuple[Profile, ...]
    targets: tuple[str, ...]
    tf32: bool
    op_lowering: str
    onnx_name: str
    onnx_sha256: str
    engine_sha256: str
    layers: dict[str, int]
    layer_types: dict[str, int]
    metadata: ModelMetadata
    plugins: dict[str, int] = dataclasses.field(default_factory=dict)
    engine_layers: EngineLayers | None = None

    @property
    def smallest_batch(self) -> int:
        """Least images that may run together."""
        return self.profiles[0][0]

    @property
    def largest_batch(self) -> int:
        """Most images that may run together."""
        return self.profiles[-1][2]

    def profile_for(self, batch: int) -> int:
        """Number of the profile that serves ``batch`` images; ValueError where none does."""
        for number, (smallest, _, largest) in enumerate(self.profiles):
            if smallest <= batch <= largest:
                return number
        raise ValueError(f"the engine takes {self.smallest_batch} to {self.largest_batch} images, not {batch}")

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values; the model's metadata as the properties of its ONNX file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            "format": MANIFEST_FORMAT,
            **values,
            "profiles": [list(profile) for profile in self.profiles],
            "targets": list(self.targets),
            "metadata": self.metadata.to_properties(),
            "engine_layers": None if self.engine_layers is None else self.engine_layers.to_json(),
        }


def batch_profiles(sizes: Sequence[int]) -> tuple[Profile, ...]:
    """One (smallest, preferred, largest) per batch size: tuned for that size, serving what the one before does not.

    ``(1, 4, 16)`` gives (1, 1, 1), (2, 4, 4) and (5, 16, 16), so that a single image never runs on kernels chosen for
    sixteen. Raises ValueError unless the sizes rise from at least 1.
    """
    sizes = tuple(sizes)
    if not sizes or sizes[0] < 1 or any(second <= first for first, second in itertools.pairwise(sizes)):
        raise ValueError(
            f"batch sizes must rise from at least 1, such as 1:4:16; they are {':'.join(map(str, sizes)) or 'missing'}"
        )
    return tuple((first + 1, size, size) for first, size in zip((0, *sizes), sizes, strict=False))


def manifest_path(engine_path: str | os.PathLike[str]) -> Path:
    """Path of the manifest beside an engine."""
    return Path(f"{os.fspath(engine_path)}.json")


def read_manifest(engine_path: str | os.PathLike[str]) -> EngineManifest:
    """Read the manifest beside an engine; ValueError with the remedy when it is missing or damaged."""
    path = manifest_path(engine_path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{engine_path} has no manifest {path.name} beside it; {REBUILD}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the manifest {path}: {one_line(error)}; {REBUILD}") from None
    if not isinstance(values, Mapping) or values.get("format") != MANIFEST_FORMAT:
        raise ValueError(f"{path} is not an engine manifest of this version; {REBUILD}")
    names = [field.name for field in dataclasses.fields(EngineManifest)]
    for name in names:
        if name not in values:
            raise ValueError(f"the manifest {path} lacks {name}; {REBUILD}")
        if not _CHECKS[name](values[name]):
            raise ValueError(f"the manifest {path} is damaged at {name}; {REBUILD}")
    try:
        metadata = ModelMetadata.from_properties(values["metadata"])
        engine_layers = None if values["engine_layers"] is None else EngineLayers.from_json(values["engine_layers"])
    except ValueError as error:
        raise ValueError(f"the manifest {path} is damaged: {one_line(error)}; {REBUILD}") from None
    read = {
        "profiles": tuple(tuple(profile) for profile in values["profiles"]),
        "targets": tuple(values["targets"]),
        "metadata": metadata,
        "engine_layers": engine_layers,
    }
    return EngineManifest(**{name: values[name] for name in names} | read)


def read_engine(path: Path) -> tuple[bytes, EngineManifest]:
    """An engine's bytes and manifest; ValueError when they do not belong together or of an unknown backend."""
    manifest = read_manifest(path)
    if manifest.backend not in BACKENDS:
        raise ValueError(f"{path} is an engine of {manifest.backend}, which this version cannot run; {REBUILD}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest.engine_sha256:
        raise ValueError(f"{path} is damaged or is not the engine that its manifest describes; {REBUILD}")
    return content, manifest


def check_target(path: Path, manifest: EngineManifest, gpu: str, capability: tuple[int, int]) -> None:
    """Raise ValueError, with how to build for it, where the engine is not for this GPU's compute capability."""
    target = f"sm_{capability[0]}{capability[1]}"
    if target in manifest.targets or (not manifest.targets and capability >= DEFAULT_LEAST_CAPABILITY):
        return
    built_for = ", ".join(manifest.targets) or "sm_80 and later"
    how = f"{REBUILD} --backend {manifest.backend} --target {target}"
    raise ValueError(f"{path} was built for {built_for}, and {gpu} is {target}; {how}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 255


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _are_profiles(value: Any) -> bool:
    """Whether the profiles rise one after another without gaps."""
    if not isinstance(value, list) or not value:
        return False
    if not all(isinstance(profile, list) and len(profile) == 3 and all(map(is_count, profile)) for profile in value):
        return False
    rising = all(1 <= profile[0] <= profile[1] <= profile[2] for profile in value)
    return rising and all(second[0] == first[2] + 1 for first, second in itertools.pairwise(value))


_CHECKS = {
    "backend": _is_text,
    "version": _is_text,
    "precision": _is_text,
    "profiles": _are_profiles,
    "targets": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "tf32": lambda value: isinstance(value, bool),
    "op_lowering": _is_text,
    "onnx_name": _is_text,
    "onnx_sha256": _is_digest,
    "engine_sha256": _is_digest,
    "layers": are_counts,
    "layer_types": are_counts,
    "metadata": lambda value: isinstance(value, Mapping),
    "plugins": are_counts,
    "engine_layers": lambda value: value is None or isinstance(value, Mapping),
}
