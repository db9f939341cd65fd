"""`asag inspect` and `asag serve-repository`, and that the guide's commands exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from asag.cli.main import asag as group

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Workspace

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "deployment.md"


@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_inspect(asag: Command, workspace: Workspace, tmp_path: Path, kind: str) -> None:
    numbers = tmp_path / "inspection.json"
    done = asag("inspect", getattr(workspace, kind), "--json", numbers)
    assert (done.code, done.error) == (0, "")
    content = json.loads(numbers.read_text())
    if kind == "checkpoint":
        assert {"name": "backbone", "value": "resnet10"} in content["configuration"]
        assert content["parameters"][-1]["part"] == "all"
        assert sum(row["numbers"] for row in content["parameters"][:-1]) == content["parameters"][-1]["numbers"]
    else:
        uses = {row["name"]: row["uses"] for row in content["functions"]}
        assert uses["asag.AdaptiveProbing"] == 2
        assert "['batch', 3, 160, 160]" in done.output
        assert all(row["types of the result"] for row in content["operators, functions inlined"])
    assert content["notes"] == []


def test_serve_repository(asag: Command, workspace: Workspace, tmp_path: Path) -> None:
    done = asag("serve-repository", workspace.model, "-o", tmp_path / "repo", "--name", "street", "--max-batch", "2")
    assert (done.code, done.error) == (0, "")
    text = (tmp_path / "repo" / "street" / "config.pbtxt").read_text()
    assert "max_batch_size: 2\n" in text
    assert "dims: [3, 160, 160]" in text
    again = asag("serve-repository", workspace.model, "-o", tmp_path / "repo", "--name", "street")
    assert again.code == 2
    assert "exists; remove it" in again.error
    assert asag("serve-repository", workspace.checkpoint, "-o", tmp_path / "repo").code == 2


def guide_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.startswith("asag ")]


@pytest.mark.parametrize("line", guide_commands())
def test_the_guides_commands_parse(line: str) -> None:
    """Each names a command with options that it has; nothing is run."""
    words = shlex.split(line)[1:]
    command = group.commands[words[0]]
    assert isinstance(command, click.Command)
    with command.make_context(words[0], words[1:], resilient_parsing=False) as context:
        assert context.params
