"""What is installed lives under one name, so that files of users beside their scripts hide nothing of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

from tests.test_rooms import FOLDERS, ROOT

LINKED = tuple(folder for folder in FOLDERS if folder not in ("asag", "benchmarks"))


def test_only_asag_is_installed() -> None:
    packages = set(find_packages(str(ROOT), include=["asag*"]))
    assert {package.partition(".")[0] for package in packages} == {"asag"}
    folders = {path.parent.relative_to(ROOT) for folder in LINKED for path in (ROOT / folder).rglob("__init__.py")}
    assert {f"asag.{'.'.join(folder.parts)}" for folder in folders} <= packages


def test_files_of_a_user_hide_nothing(tmp_path: Path) -> None:
    for name in LINKED:
        (tmp_path / f"{name}.py").write_text(f"print('the {name}.py of a user ran')\n")
    (tmp_path / "script.py").write_text("""
import asag.cli.main, asag.train.loop, asag.export.model, asag.trt_plugins.operations
from asag.runtime import open_session
from asag.runtime.reports.page import _template
from asag.trt_plugins.compile import kernel_source
print(open_session.__module__)
_template(), kernel_source("select_tokens.cu")  # files that are no modules
""")
    command = [sys.executable, "script.py"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "asag.runtime.opening\n"


@pytest.mark.parametrize("folder", LINKED)
def test_a_checkout_finds_a_folder_by_its_link(folder: str) -> None:
    link = ROOT / "asag" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder
