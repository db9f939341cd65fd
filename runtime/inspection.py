"""What a model file holds, without running it: tables for a person, JSON values for a program."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag.runtime.errors import BackendUnavailableError, one_line
from asag.runtime.metadata import ModelMetadata

if TYPE_CHECKING:
    from asag.runtime.engines.layers import EngineLayers

LARGEST = 8
"""Largest tensors that are listed."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A titled table; ``rows`` have as many values as there are ``columns``."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Everything found in a file; ``notes`` are single lines about what could not be found out, and why."""

    path: Path
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The tables as JSON values, each a list of objects under its title."""
        tables = {
            section.title: [dict(zip(section.columns, row, strict=True)) for row in section.rows]
            for section in self.sections
        }
        return {"file": str(self.path), **tables, "notes": list(self.notes)}


def inspect_file(path: str | os.PathLike[str]) -> Inspection:
    """Inspect an .onnx, .engine or .safetensors file.

    Raises FileNotFoundError for a missing file and ValueError for one that is damaged or of an unknown kind.
    """
    path = Path(path)
    inspector = {".onnx": _inspect_onnx, ".engine": _inspect_engine, ".safetensors": _inspect_checkpoint}.get(
        path.suffix.lower()
    )
    if inspector is None:
        raise ValueError(f"unknown kind of model {path}: expected .onnx, .engine, .safetensors")
    if not path.exists():
        raise FileNotFoundError(f"model not found: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name a model file")
    return inspector(path)


def _facts(title: str, values: Mapping[str, Any]) -> Section:
    return Section(title, ("name", "value"), tuple(values.items()))


def _metadata_facts(metadata: ModelMetadata) -> Section:
    values = {field.name: getattr(metadata, field.name) for field in dataclasses.fields(metadata)}
    names = values.pop("category_names")
    ids = values.pop("category_ids")
    stages, choices, replaced = values.pop("stages"), values.pop("choices"), values.pop("replaced")
    values |= {f"choice: {name}": value for name, value in choices.items()}
    values |= {f"stage: {stage.title}": ", ".join(value.name for value in stage.values) for stage in stages}
    values |= {f"replaced: {name}": count for name, count in replaced.items()}
    shown = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    shown["classes"] = f"{len(ids)}: " + ", ".join(f"{i} {name}" for i, name in zip(ids, names, strict=True))
    return _facts("model", shown)


def _counts(title: str, name: str, counts: Mapping[str, int]) -> Section:
    return Section(title, (name, "count"), tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))))


def _inspect_onnx(path: Path) -> Inspection:
    import onnx

    try:
        model = onnx.load_model(str(path))
    except Exception as error:  # protobuf and onnx raise classes of their own
        raise ValueError(f"cannot read {path} as ONNX, export it again with `asag export`: {one_line(error)}") from None
    notes = []
    try:
        metadata = [
            _metadata_facts(ModelMetadata.from_properties({item.key: item.value for item in model.metadata_props}))
        ]
    except ValueError as error:
        metadata = []
        notes.append(one_line(error))
    file = {
        "bytes": path.stat().st_size,
        "IR version": model.ir_version,
        "operator sets": ", ".join(f"{item.domain or 'ai.onnx'} {item.version}" for item in model.opset_import),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
    }
    try:
        operators = _operators(onnx, model)
    except Exception as error:  # inference on a damaged graph raises anything
        raise ValueError(f"{path} is damaged, export it again with `asag export`: {one_line(error)}") from None
    functions = Section(
        "functions",
        ("name", "nodes", "uses"),
        tuple(
            (
                f"{function.domain}.{function.name}",
                len(function.node),
                sum(node.op_type == function.name and node.domain == function.domain for node in _all_nodes(model)),
            )
            for function in model.functions
        ),
    )
    sections = (_facts("file", file), *metadata, _interface(onnx, model), operators, functions)
    return Inspection(path, (*sections, *_weights(onnx, model)), tuple(notes))


def _all_nodes(model: Any) -> list[Any]:
    return [*model.graph.node, *(node for function in model.functions for node in function.node)]


def _element_type(onnx: Any, number: int) -> str:
    try:
        return str(onnx.TensorProto.DataType.Name(number)).lower()
    except ValueError:
        return f"type {number}"


def _interface(onnx: Any, model: Any) -> Section:
    rows = []
    for role, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            tensor = value.type.tensor_type
            shape = [dimension.dim_param or dimension.dim_value for dimension in tensor.shape.dim]
            rows.append((role, value.name, _element_type(onnx, tensor.elem_type), str(shape)))
    return Section("inputs and outputs", ("role", "name", "type", "shape"), tuple(rows))


def _operators(onnx: Any, model: Any) -> Section:
    """Operators of the graph with its functions inlined, and the element types that they give."""
    from onnx import inliner, shape_inference

    flat = shape_inference.infer_shapes(inliner.inline_local_functions(model))
    types = {value.name: value.type.tensor_type.elem_type for value in (*flat.graph.value_info, *flat.graph.output)}
    found: dict[str, Counter[str]] = {}
    for node in flat.graph.node:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        given = types.get(node.output[0], 0) if node.output else 0
        found.setdefault(name, Counter())[_element_type(onnx, given) if given else "not inferred"] += 1
    ordered = sorted(found.items(), key=lambda item: (-item[1].total(), item[0]))
    rows = [(name, counts.total(), ", ".join(f"{t} {n}" for t, n in counts.most_common())) for name, counts in ordered]
    return Section("operators, functions inlined", ("operator", "count", "types of the result"), tuple(rows))


def _weights(onnx: Any, model: Any) -> tuple[Section, Section]:
    tensors = [
        (tensor.name, _element_type(onnx, tensor.data_type), list(tensor.dims), _tensor_bytes(tensor))
        for tensor in model.graph.initializer
    ]
    by_type: dict[str, list[int]] = {}
    for _, kind, _, size in tensors:
        by_type.setdefault(kind, []).append(size)
    summary = [(kind, len(sizes), round(sum(sizes) / 1e6, 3)) for kind, sizes in by_type.items()]
    largest = sorted(tensors, key=lambda tensor: -tensor[3])[:LARGEST]
    rows = [(name, kind, str(shape), round(size / 1e6, 3)) for name, kind, shape, size in largest]
    return (
        Section("weights", ("type", "tensors", "MB"), tuple(sorted(summary, key=lambda row: -row[2]))),
        Section("largest weights", ("name", "type", "shape", "MB"), tuple(rows)),
    )


def _tensor_bytes(tensor: Any) -> int:
    external = {entry.key: entry.value for entry in tensor.external_data}
    if external.get("length", "").isdecimal():
        return int(external["length"])
    return len(tensor.raw_data) or tensor.ByteSize()


def _inspect_engine(path: Path) -> Inspection:
    from asag.runtime.backends.engine_session import EngineSession
    from asag.runtime.engines.layers import summarize
    from asag.runtime.engines.manifest import read_engine

    content, manifest = read_engine(path)
    plugins = ", ".join(f"{count} {name}" for name, count in manifest.plugins.items())
    facts = {
        "bytes": len(content),
        "backend": f"{manifest.backend} {manifest.version}",
        "precision": manifest.precision,
        "TF32": "on" if manifest.tf32 else "off",
        "GPU architectures": ", ".join(manifest.targets) or "sm_80 and later",
        "asag ops": f"{manifest.op_lowering}: {plugins}" if plugins else manifest.op_lowering,
        "built from": f"{manifest.onnx_name} (SHA-256 {manifest.onnx_sha256})",
    }
    profiles = Section("profiles", ("smallest batch", "tuned for", "largest batch"), manifest.profiles)
    sections = [_facts("file", facts), _metadata_facts(manifest.metadata), profiles]
    sections.append(_counts("layers before fusion", "layer", manifest.layers))
    sections.append(_counts("element types before fusion", "type", manifest.layer_types))
    layers, notes = manifest.engine_layers, []
    try:
        with contextlib.closing(EngineSession(path)) as session:
            sections.append(_engine_memory("memory of a context, on this GPU", session.device_memory()))
            layers = layers or summarize(session.layer_information(), {})
    except (BackendUnavailableError, ValueError) as error:
        missing = "what a context takes on the GPU" if layers else "layers after fusion and their memory"
        notes.append(f"{missing} can be read where a GPU opens the engine: {one_line(error)}")
    return Inspection(path, (*sections, *(_engine_layers(layers) if layers else ())), tuple(notes))


def _engine_memory(title: str, sizes: Sequence[int]) -> Section:
    return Section(title, ("profile", "MB"), tuple((number, round(size / 1e6, 3)) for number, size in enumerate(sizes)))


def _engine_layers(layers: EngineLayers) -> list[Section]:
    sections = [
        _counts("layers after fusion", "kernel", layers.kernels),
        _counts("element types after fusion", "type", layers.types),
        Section("fused layers", ("kernel", "operators", "count"), layers.fused),
    ]
    if layers.activation_bytes:
        sections.append(_engine_memory("intermediate results, as the builder planned them", layers.activation_bytes))
    if layers.weight_bytes:
        sections.append(_facts("weights in the engine", {"MB": round(layers.weight_bytes / 1e6, 3)}))
    return sections


def _inspect_checkpoint(path: Path) -> Inspection:
    import safetensors

    try:
        # The shapes come from the file's header; no tensor is read.
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            tensors = [(name, part.get_dtype(), list(part.get_shape())) for name, part in slices.items()]
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a readable safetensors file ({one_line(error)}); copy or train it again"
        ) from None
    parts: dict[tuple[str, str], list[int]] = {}
    for name, kind, shape in tensors:
        count = 1
        for side in shape:
            count *= side
        parts.setdefault((name.partition(".")[0], kind), []).append(count)
    rows = [(part, kind, len(counts), sum(counts)) for (part, kind), counts in parts.items()]
    total = ("all", "", len(tensors), sum(row[3] for row in rows))
    described, notes = _described(header)
    sections = [
        _facts("file", {"bytes": path.stat().st_size}),
        *described,
        Section("parameters", ("part", "type", "tensors", "numbers"), (*sorted(rows, key=lambda row: -row[3]), total)),
    ]
    return Inspection(path, tuple(sections), notes)


def _described(header: Mapping[str, str]) -> tuple[list[Section], tuple[str, ...]]:
    """The configuration and the rest of what the file says of itself."""
    try:
        description = json.loads(header["asag"])
        return [
            _facts("configuration", dict(_flat(description["config"]))),
            _facts("checkpoint", dict(_flat(description["info"]))),
        ], ()
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return [], ("no asag description in the file; for a published checkpoint run `asag zoo convert` first",)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return flat
