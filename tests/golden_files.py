"""Reading the golden cases of any family."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The same folder as the fixture `goldens`; its names are needed while tests are collected.
GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"

Case = tuple[dict[str, NDArray], dict[str, Any]]
"""Arrays, and `meta`."""


@functools.cache
def module(folder: Path) -> ModuleType:
    """`golden_weights.py` of a folder."""
    spec = importlib.util.spec_from_file_location(f"golden_weights_{folder.name}", folder / "golden_weights.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def read_case(folder: Path, name: str) -> Case:
    """A case of a folder."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("meta")))
