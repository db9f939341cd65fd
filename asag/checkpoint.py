"""Our checkpoints: weights as safetensors, with everything needed to rebuild the detector in the file's metadata."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec
import safetensors
import safetensors.torch

from asag import families
from asag.detector import Detector, build_detector
from asag.families import NamedPreset, family_of, find_family
from asag.family import Family, InputSpec

SCHEMA = 2
"""Of the record in a file. Files of schema 1 name no family: there was one."""

_KEY = "asag"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint knows about its data besides the tensors."""

    preset: str
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]
    input: InputSpec = field(default_factory=InputSpec)

    def __post_init__(self) -> None:
        if len(self.category_ids) != len(self.category_names):
            raise ValueError(f"{len(self.category_ids)} category ids for {len(self.category_names)} category names")

    @classmethod
    def of(cls, preset: NamedPreset, categories: Mapping[int, str]) -> Self:
        """Of a detector of `preset` for these categories (id -> name)."""
        return cls(preset.name, tuple(categories), tuple(categories.values()), preset.input)


def save_detector(path: str | Path, detector: Detector, info: CheckpointInfo) -> None:
    """Write weights and metadata to `path` (.safetensors), whole or not at all.

    Raises ValueError for another number of categories than classes, OSError where it cannot be written.
    """
    path = Path(path)
    if len(info.category_ids) != detector.config.classes:
        raise ValueError(f"{len(info.category_ids)} categories for a detector of {detector.config.classes} classes")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in detector.state_dict().items()}
    description = {
        "schema": SCHEMA,
        "family": family_of(detector.config).name,
        "config": dataclasses.asdict(detector.config),
        "info": dataclasses.asdict(info),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        ordinary = temporary.stat().st_mode  # the library would leave a file that only its owner can read
        safetensors.torch.save_file(tensors, temporary, {_KEY: json.dumps(description)})
        temporary.chmod(ordinary)
        temporary.replace(path)
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_detector(path: str | Path, choices: Mapping[str, Any] | None = None) -> tuple[Detector, CheckpointInfo]:
    """Read a checkpoint of :func:`save_detector`; the detector is in evaluation mode on the CPU.

    choices: fields of the configuration to deploy with in place of the checkpoint's, by the names of the family's
    choices; those that are None are left out. Raises FileNotFoundError, or ValueError with one line saying what is
    wrong with the file or a choice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); copy or train it again") from None
    family, config, info = read_description(path, metadata)
    config = choose(family, config, choices or {})
    try:
        detector = build_detector(config)
        detector.load_state_dict(tensors)
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: the tensors do not fit its configuration: {reason}") from None
    return detector, info


def read_description(path: Path, metadata: Mapping[str, str]) -> tuple[Family, Any, CheckpointInfo]:
    """Family, configuration and info of a checkpoint's header. Raises ValueError in one line."""
    try:
        content = json.loads(metadata[_KEY])
        schema = content.get("schema", 1)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise ValueError(f"it was written by a newer version (schema {schema}, this one reads {SCHEMA})")
        family = families.FAMILIES[0] if schema == 1 else find_family(content["family"])
        values, info = (content["config"], content["info"])
        if schema == 1:
            values, info = _from_schema_1(family, values, info)
        return family, _as(family.config, values), _as(CheckpointInfo, info)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        newer = "newer version" in str(error)
        remedy = "update asag" if newer else "for a published checkpoint run `asag zoo convert` first"
        raise ValueError(f"{path}: no asag description in the file that can be read ({error}); {remedy}") from None


def _from_schema_1(family: Family, config: Any, info: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Choices stood among the info's fields, and the input's numbers too."""
    config, info = dict(config), dict(info)
    for choice in family.choices:
        if choice.name in info:
            config[choice.name] = info.pop(choice.name)
    if "input_size" in info:
        info["size"] = info.pop("input_size")
    named = {each.name for each in dataclasses.fields(InputSpec)}
    info["input"] = {name: info.pop(name) for name in list(info) if name in named}
    return config, info


def _as(kind: Any, values: Any) -> Any:
    """A frozen dataclass of JSON values; unlike the library, with no field that it does not know. ValueError."""
    made = msgspec.convert(values, kind)
    unknown = sorted(set(values) - {each.name for each in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"unknown options {', '.join(unknown)}; was the file written by a newer version?")
    return made


def choose(family: Family, config: Any, choices: Mapping[str, Any]) -> Any:
    """The configuration with other choices, except those that are None.

    Raises ValueError for a choice that the family does not have, or a value that it does not take.
    """
    wanted = {name: value for name, value in choices.items() if value is not None}
    known = {choice.name: choice for choice in family.choices}
    for name, value in wanted.items():
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"{family.title} has no choice {name.replace('_', ' ')}; its choices are {listed}")
        if known[name].values and value not in known[name].values:
            listed = ", ".join(map(str, known[name].values))
            raise ValueError(f"{name.replace('_', ' ')} is {value!r}; choose one of {listed}")
    types = typing.get_type_hints(family.config)
    converted = {}
    for name, value in wanted.items():
        try:
            converted[name] = msgspec.convert(value, types[name])
        except msgspec.ValidationError:
            told = f"{name.replace('_', ' ')} is {value!r}, which is not of the form {known[name].form}"
            raise ValueError(told) from None
    return dataclasses.replace(config, **converted)
