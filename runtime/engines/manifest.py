"""The manifest beside an engine: what it was built from, for what, and which profile serves which batch."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from asag.runtime.engines.backend import BACKENDS
from asag.runtime.engines.layers import Count, EngineLayers
from asag.runtime.errors import one_line
from asag.runtime.metadata import ModelMetadata
from asag.runtime.records import check_format, convert, read_json, to_json

MANIFEST_FORMAT = 3
REBUILD = "build the engine again: asag build MODEL.onnx -o MODEL.engine"

DEFAULT_LEAST_CAPABILITY = (8, 0)
"""What TensorRT-RTX covers when no architecture is named."""

Text = Annotated[str, Meta(min_length=1, max_length=255)]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Profile = tuple[Count, Count, Count]


@dataclasses.dataclass(frozen=True)
class EngineManifest:
    """What an engine was built from, kept as JSON beside it (``model.engine.json``).

    ``profiles`` are (smallest, preferred, largest) batches, rising and without gaps; ``targets`` the GPU architectures
    ("sm_86") that were named or, for TensorRT, that of the GPU it was built on; empty for TensorRT-RTX's default of
    compute capability 8.0 and later. ``op_lowering`` says what became of the ops of domain ``asag``: "inlined" into
    standard operators, or "plugins", counted by name in ``plugins``. ``layers`` counts the network's layers by type as
    the builder got them, before fusion, and ``layer_types`` their outputs by element type; ``engine_layers`` is what
    the builder made of them, where it said so. The ONNX digest and name are those of the user's file, also where it was
    converted to another precision first. Digests are SHA-256 of the files' bytes. Raises
    ValueError for profiles with gaps.
    """

    backend: Text
    version: Text
    precision: Text
    profiles: Annotated[tuple[Profile, ...], Meta(min_length=1)]
    targets: tuple[Text, ...]
    tf32: bool
    op_lowering: Text
    onnx_name: Text
    onnx_sha256: Digest
    engine_sha256: Digest
    layers: dict[str, Count]
    layer_types: dict[str, Count]
    metadata: ModelMetadata
    plugins: dict[str, Count]
    engine_layers: EngineLayers | None

    def __post_init__(self) -> None:
        rising = all(1 <= smallest <= preferred <= largest for smallest, preferred, largest in self.profiles)
        if not rising or any(second[0] != first[2] + 1 for first, second in itertools.pairwise(self.profiles)):
            raise ValueError(f"profiles must rise from at least 1 without gaps, they are {self.profiles}")

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
        return {"format": MANIFEST_FORMAT, **to_json(self), "metadata": self.metadata.to_properties()}


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
        values = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{engine_path} has no manifest {path.name} beside it; {REBUILD}") from None
    except ValueError as error:
        raise ValueError(f"{error}; {REBUILD}") from None
    if not isinstance(values, dict) or "format" not in values:
        raise ValueError(f"{path} is no engine manifest; {REBUILD}")
    check_format(path, values["format"], MANIFEST_FORMAT, REBUILD)
    try:
        metadata = ModelMetadata.from_properties(convert(values.get("metadata"), dict[str, str], "metadata"))
        return convert({**values, "metadata": metadata}, EngineManifest)
    except ValueError as error:
        raise ValueError(f"the manifest {path} is damaged: {one_line(error)}; {REBUILD}") from None


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
