"""What holds for every family: names, presets, choices, and that nobody else knows them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from asag import find_preset
from asag.families import FAMILIES, all_presets, family_of, find_family
from asag.family import Family, Preset

ROOT = Path(__file__).parents[2]
SOURCES = ("asag", "cli", "benchmarks", "export", "runtime", "train", "trt_plugins")
DEFAULT = re.compile(r"^(DEFAULT_)?PRESET = |default: |--preset |@click.option\(.*default=")
"""Lines that name a preset because a command has a default or shows an example."""

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def test_names_are_unique() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    presets = [preset.name for preset in all_presets()]
    assert len(set(presets)) == len(presets)
    assert len({family.config for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("preset", list(all_presets()), ids=lambda preset: preset.name)
def test_a_preset_is_found_with_its_family(preset: Preset) -> None:
    found = find_preset(preset.name)
    assert found == preset
    assert family_of(found.config) is found.family
    assert dataclasses.is_dataclass(found.config)
    assert found.config.num_classes == found.config.classes
    assert dataclasses.replace(found.config, num_classes=3).classes == 3
    fields = {field.name for field in dataclasses.fields(found.family.settings)}
    assert fields.isdisjoint({"epochs", "batch_size", "learning_rate"}), "the loop has these"


def test_an_unknown_preset_names_similar_ones() -> None:
    with pytest.raises(ValueError, match="no preset 'asag-a-r50-1x'; did you mean asag-a-r50-1x-") as caught:
        find_preset("asag-a-r50-1x")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no preset 'unheard of'; the presets are "):
        find_preset("unheard of")


def test_unknown_families_and_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="no family of detectors 'yolo'; this version knows "):
        find_family("yolo")
    with pytest.raises(ValueError, match="dict is no detector's configuration"):
        family_of({})


@every_family
def test_choices_are_fields_and_settings_have_defaults(family: Family) -> None:
    types = typing.get_type_hints(family.config)
    config = next(iter(family.presets.values())).config
    for choice in family.choices:
        assert choice.name in types
        assert not choice.values or getattr(config, choice.name) in choice.values
    family.settings()


@every_family
def test_the_first_stage_is_the_features_and_values_have_names_of_their_own(family: Family) -> None:
    for preset in family.presets.values():
        stages = family.stages(preset.config)
        assert stages[0].name == "features"
        assert {value.kind for value in stages[0].values} == {"maps"}
        names = [name for stage in stages for name in stage.value_names()]
        assert len(set(names)) == len(names)
        parts = [stage.timed_as for stage in stages]
        assert parts == sorted(parts, key=parts.index), "stages that are timed together follow one another"


ORDINARY = {"main", "padded", "content"}
"""Values of choices that are words of the toolkit, too."""


def words_of(family: Family) -> set[str]:
    """What gives a family away: its presets, its classes, its own settings and choices, its folder."""
    names = set(family.presets) | {family.config.__name__, family.settings.__name__, f"families.{family.name}"}
    shared = {field.name for other in FAMILIES if other != family for field in dataclasses.fields(other.settings)}
    names |= {field.name for field in dataclasses.fields(family.settings)} - shared
    names |= {value for choice in family.choices for value in choice.values if isinstance(value, str)} - ORDINARY
    names |= {choice.name for choice in family.choices if len(choice.name) > 8}
    # One family has the package's name, which everybody says, and one that of an attention.
    return names | ({family.name} - {"asag", "deformable"})


@every_family
def test_no_family_is_named_outside_its_folder(family: Family) -> None:
    words = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in sorted(words_of(family))))
    allowed = {ROOT / "asag/families/__init__.py", ROOT / "runtime/schema_1.py"}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for room in SOURCES
        for path in sorted((ROOT / room).rglob("*.py"))
        if ROOT / "asag/families" not in path.parents and path not in allowed
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if words.search(line) and not DEFAULT.search(line.strip())
    ]
    assert not found, "\n".join(found)


def test_families_do_not_import_each_other() -> None:
    folders = [path for path in (ROOT / "asag/families").iterdir() if path.is_dir() and path.name != "__pycache__"]
    for folder in folders:
        others = [re.compile(rf"\basag\.families\.{other.name}\b") for other in folders if other != folder]
        for path in folder.rglob("*.py"):
            assert not any(other.search(path.read_text()) for other in others), path


def test_presets_need_no_torch() -> None:
    code = "import asag, sys; asag.find_preset('asag-a-tiny').config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
