"""From a published checkpoint, of whatever family, to one of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from asag import families
from asag.checkpoint import CheckpointInfo, save_detector
from asag.datasets import categories_of
from asag.detector import Detector, build_detector
from asag.families import NamedPreset, all_presets, family_of, find_preset
from asag.family import Family
from asag.foreign_files import read_foreign


class PublishedFormat(Protocol):
    """The files that a family's authors, or others, distribute."""

    looked_for: str
    """What `identify` recognizes a file by, for the message that nothing was recognized."""

    def identify(self, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> Any | None:
        """The configuration that has these tensors, or None where they are of another family.

        description: see :class:`asag.foreign_files.ForeignFile`. Raises ValueError for a variant that is not known.
        """

    def translate(self, name: str, value: Tensor, config: Any) -> Iterator[tuple[str, Tensor]] | None:
        """A tensor under our names; one may become several. Empty for one that is known and not needed, and None for
        one that does not belong to this family.

        Rows of classes that `config` does not have are dropped here.
        """


@dataclass(frozen=True)
class Converted:
    """What a published file turned out to be."""

    preset: str
    """Its name, or "custom" where no preset has these tensors."""
    config: Any
    alternatives: tuple[str, ...]
    """All presets with these tensors."""
    overruled: Mapping[str, tuple[Any, Any]]
    """Choices in which a named preset differs from what the file tells: name -> (the file's, the preset's)."""


def identify(state: Mapping[str, Tensor], description: Mapping[str, Any] | None = None) -> tuple[Family, Any]:
    """The family that recognizes published tensors, and their configuration.

    Raises ValueError naming what was looked for where none does, or what is odd about the tensors.
    """
    formats = [(family, family.published()) for family in families.FAMILIES]
    found = []
    for family, published in formats:
        try:
            config = published.identify(state, description or {})
        except KeyError as missing:
            raise ValueError(f"a {family.title} without the tensor {missing}; is the file whole?") from None
        if config is not None:
            found.append((family, config))
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(family.title for family, _ in found)
        raise ValueError(f"the tensors could be those of {names}")
    looked_for = "; ".join(f"{family.title}: {published.looked_for}" for family, published in formats)
    raise ValueError(f"no published detector that is known here; looked for {looked_for}")


def load_published(detector: Detector, state: Mapping[str, Tensor | np.ndarray]) -> None:
    """Load published tensors, {published name: tensor or array}, in place.

    Strict: raises ValueError naming the tensors that are missing, left over, or of another shape.
    """
    published = family_of(detector.config).published()
    ours = detector.state_dict()
    loaded: dict[str, Tensor] = {}
    problems: dict[str, list[str]] = {"missing": [], "left over": [], "of another shape": []}
    for name, value in sorted(state.items()):  # a layer's own tensor after the first one's, which may stand for all
        if name.endswith("num_batches_tracked"):
            continue
        tensor = torch.as_tensor(np.asarray(value) if isinstance(value, np.ndarray) else value)
        translated = published.translate(name, tensor, detector.config)
        if translated is None:
            problems["left over"].append(name)
            continue
        for target, part in translated:
            loaded[target] = part
            if target not in ours:
                problems["left over"].append(name)
            elif part.shape != ours[target].shape:
                shapes = f"{list(part.shape)} (expected {list(ours[target].shape)})"
                problems["of another shape"].append(f"{name} {shapes}")
    problems["missing"] = [name for name in ours if name not in loaded and not name.endswith("num_batches_tracked")]
    told = [
        f"{label}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})"
        for label, names in problems.items()
        if names
    ]
    if told:
        raise ValueError("the state does not fit this detector; tensors " + "; ".join(told))
    detector.load_state_dict(loaded, strict=False)


def convert_published(source: str | Path, output: str | Path, preset: str | None = None) -> Converted:
    """Read a published file or folder, write our checkpoint to `output`; returns what was found.

    preset: which one it is; by default the first with these tensors, or with these choices where the file tells them.
    Classes have the names that the file tells. Raises FileNotFoundError or ValueError, naming the file, when it cannot
    be read, no family knows it, or tensors and preset disagree.
    """
    file = read_foreign(source)
    try:
        family, config = identify(file.tensors, file.description)
        fitting = {known.name: known for known in all_presets() if _same_tensors(family, known, config)}
        if preset is not None and preset not in fitting:
            find_preset(preset)
            listed = ", ".join(fitting) or "no preset"
            raise ValueError(f"the tensors are not those of {preset}; they fit {listed}")
        alike = [name for name, known in fitting.items() if known.config == config]
        chosen = fitting.get(preset or next(iter(alike or fitting), ""))
        told = family.choices_of(config)
        if chosen is not None:
            config = dataclasses.replace(config, **family.choices_of(chosen.config))
        detector = build_detector(config)
        load_published(detector, file.tensors)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    classes = categories(config.classes, file.description)
    info = CheckpointInfo("custom", tuple(classes), tuple(classes.values()))
    if chosen is not None:
        info = CheckpointInfo.of(chosen, classes)
    save_detector(output, detector, info)
    overruled = {}
    if preset is not None and file.description:
        overruled = {
            name: (told[name], value) for name, value in family.choices_of(config).items() if value != told[name]
        }
    return Converted(info.preset, config, tuple(fitting), overruled)


def categories(classes: int, description: Mapping[str, Any]) -> dict[int, str]:
    """{id: name} as MMDetection's `meta` or Hugging Face's `config.json` tells them; numbered from 1, as in annotations
    that labelling tools write, unless they are those of a published dataset.
    """
    known, dataset, labels = categories_of(classes), description.get("dataset_meta"), description.get("id2label")
    told: Any = description.get("CLASSES")
    if isinstance(dataset, Mapping):
        told = dataset.get("classes", dataset.get("CLASSES"))
    if isinstance(labels, Mapping):
        told = [labels.get(str(number)) for number in range(len(labels))]
    if not isinstance(told, list | tuple) or not all(isinstance(name, str) for name in told):
        return known
    made_up = all(name.startswith("LABEL_") for name in told)
    if len(set(told)) != classes or made_up or list(told) == list(known.values()):
        return known
    return dict(enumerate(told, start=1))


def _same_tensors(family: Family, known: NamedPreset, config: Any) -> bool:
    """Whether a preset differs from a configuration in nothing but its choices, and in what no tensor shows."""
    if known.family is not family:
        return False
    free = {choice.name for choice in family.choices} | {"train_batch_statistics"}
    decisive = [field.name for field in dataclasses.fields(config) if field.name not in free]
    return all(getattr(config, name) == getattr(known.config, name) for name in decisive)
