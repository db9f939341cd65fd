"""The families of detectors. This list is the only place outside a family's own folder that names one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from asag.families.adamixer import ADAMIXER
from asag.families.asag import ASAG
from asag.families.deformable import DEFORMABLE
from asag.families.sap_detr import SAP_DETR
from asag.family import Family, Preset

FAMILIES: tuple[Family, ...] = (ASAG, ADAMIXER, DEFORMABLE, SAP_DETR)


@dataclass(frozen=True, kw_only=True)
class NamedPreset(Preset):
    """A preset, what it is called, and whose it is."""

    name: str
    family: Family


def find_family(name: str) -> Family:
    """The family of that name. Raises ValueError naming the known ones."""
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"no family of detectors {name!r}; this version knows {known}")


def family_of(config: Any) -> Family:
    """The family whose configuration this is. Raises ValueError for anything else."""
    for family in FAMILIES:
        if type(config) is family.config:
            return family
    known = ", ".join(family.config.__name__ for family in FAMILIES)
    raise ValueError(f"{type(config).__name__} is no detector's configuration; they are {known}")


def all_presets() -> Iterator[NamedPreset]:
    """The presets of every family, in order."""
    for family in FAMILIES:
        for name, preset in family.presets.items():
            yield NamedPreset(name=name, family=family, **vars(preset))


def find_preset(name: str) -> NamedPreset:
    """The preset called `name`. Raises ValueError naming similar ones."""
    known = {preset.name: preset for preset in all_presets()}
    if name not in known:
        similar = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        listed = f"did you mean {' or '.join(similar)}?" if similar else f"the presets are {', '.join(known)}"
        raise ValueError(f"no preset {name!r}; {listed}")
    return known[name]
