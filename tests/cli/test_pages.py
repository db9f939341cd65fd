"""The pages of the command line: help of every command, the list of presets, the version."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest

from asag import __version__
from asag.cli.main import asag as root
from asag.families import FAMILIES, all_presets

if TYPE_CHECKING:
    from tests.cli.conftest import Command


def command_names(group: click.Group = root, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and subcommand as the words that call it."""
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found.append((*prefix, name))
        if isinstance(command, click.Group):
            found += command_names(command, (*prefix, name))
    return found


@pytest.mark.parametrize("words", [(), *command_names()], ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(asag: Command, words: tuple[str, ...], option: str) -> None:
    done = asag(*words, option)
    assert (done.code, done.error) == (0, "")
    assert done.output.startswith(f"Usage: {' '.join(('asag', *words))}")
    assert max(map(len, done.output.splitlines())) <= 100
    sentences = done.output.split("Options:", maxsplit=1)[0].split("\n\n")[1:]
    assert sentences, "a manual page says what the command does"


def test_every_option_is_explained() -> None:
    for words in command_names():
        command: click.Command = root
        for word in words:
            assert isinstance(command, click.Group)
            command = command.commands[word]
        assert command.short_help, words
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{words} {parameter.name}"


def test_the_issue_s_commands_are_there() -> None:
    expected = {"train", "evaluate", "export", "build", "detect", "parity", "bench", "demo", "zoo"}
    assert expected <= set(root.commands)


def test_without_a_command_the_page_is_shown(asag: Command) -> None:
    for words in ((), ("data",)):
        done = asag(*words)
        assert done.code in (0, 2)
        page = done.output + done.error
        assert page.startswith("Usage: asag")
        assert len(page.splitlines()) > 5, "readable, not squeezed into one line"


def test_version(asag: Command) -> None:
    done = asag("--version")
    assert done.code == 0
    assert __version__ in done.output


def test_zoo_lists_every_preset(asag: Command) -> None:
    done = asag("zoo")
    assert done.code == 0
    lines = {line.split()[0]: line for line in done.output.splitlines() if line.split()}
    for preset in all_presets():
        assert preset.config.backbone in lines[preset.name]
        told = preset.published.accuracy.split(",")[0] if preset.published is not None else "for demos"
        assert told in lines[preset.name]
    assert all(family.title in done.output for family in FAMILIES)


def test_help_and_zoo_start_quickly() -> None:
    """Neither PyTorch nor NumPy is imported to print a page."""
    code = """
import sys
from asag.cli.main import main
for words in (["--help"], ["train", "--help"], ["export", "--help"], ["zoo"]):
    try:
        main(words)
    except SystemExit as ending:
        assert ending.code == 0
print("imported:", [name for name in ("torch", "numpy", "onnx", "onnxruntime", "pycocotools") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "asag.cli.main", "detect", "--unknown"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["asag: No such option '--unknown'; see `asag detect --help`"]
