"""What importing and detecting must not import; asked of a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torchvision", "onnx", "asag.detector", "asag.families", "asag.train", "asag.export")
"""Of `asag` only the data types that describe a family are light."""


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_runtime_imports_no_backend() -> None:
    code = (
        f"import asag.runtime, sys; print([name for name in {(*HEAVY, 'onnxruntime', 'numpy')} if name in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_no_module_imports_torch() -> None:
    served = ROOT / "runtime/serving/model.py"  # runs inside Triton's server alone
    paths = sorted(set((ROOT / "runtime").rglob("*.py")) - {served})
    modules = [
        "asag." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths
    ]
    code = f"import {', '.join(modules)}, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_detecting_with_onnx_never_imports_torch(toy_onnx: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(image)
    code = f"""
import sys
from asag.runtime import open_session
from asag.runtime.detect import detect_files
summary = detect_files(open_session(sys.argv[1]), [sys.argv[2]], sys.argv[3])
print(summary.images, summary.detections, [name for name in {HEAVY} if name in sys.modules])
"""
    assert run_python(code, str(toy_onnx), str(image), str(tmp_path / "out")).strip() == "1 16 []"


def test_unknown_name_is_an_attribute_error() -> None:
    from asag import runtime

    assert set(runtime.__all__) <= set(dir(runtime))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        runtime.nothing  # noqa: B018
