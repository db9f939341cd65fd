"""The record of a run: what was asked for and what it was run with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import torchvision

PACKAGES = ("asag", "numpy", "scipy", "pillow", "pycocotools", "safetensors")


def versions() -> dict[str, str]:
    """Python's and the packages' versions; a package that is not installed says so."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    # The modules tell which CUDA they were built for; the distribution need not.
    found |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    return found


def git_revision() -> dict[str, Any] | None:
    """The commit that this code was run from, and whether tracked files differ from it; None outside a repository."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": changed}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return finished.stdout.strip()
