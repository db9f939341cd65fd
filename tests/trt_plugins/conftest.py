"""The genuine TensorRT bindings on a machine without TensorRT's builder, and an exported detector."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from asag.deploy import DeployedDetector
from asag.export.model import export_onnx
from asag.trt_plugins.compile import supported_capabilities
from tests.builders import random_detector, small_info

BINDINGS = "tensorrt-cu13-bindings"
RUNTIME = "tensorrt-lean-cu13-libs"

# Entry points that the bindings link to, by library, and that the lean runtime lacks. They return null.
MISSING = {
    "nvinfer": ("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "getBuilderPluginRegistry"),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": ("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
}


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips where nothing compiles kernels."""
    try:
        supported_capabilities()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small detector as an ONNX file."""
    path = tmp_path_factory.mktemp("exported") / "small.onnx"
    export_onnx(DeployedDetector(random_detector(), small_info()), path)
    return path


@pytest.fixture(scope="session")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """TensorRT: the installed one, else its bindings over the lean runtime, whose plugin registry is real."""
    if importlib.util.find_spec("tensorrt") is not None:
        return importlib.import_module("tensorrt")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs TensorRT, or a C compiler beside its bindings")
    try:
        version = importlib.metadata.version(BINDINGS).split(".")[0]
        importlib.metadata.version(RUNTIME)
    except importlib.metadata.PackageNotFoundError as missing:
        pytest.skip(f"needs TensorRT, or {BINDINGS} with {RUNTIME}; {missing.name} is not installed")
    folder = tmp_path_factory.mktemp("tensorrt")
    specification = importlib.util.find_spec("tensorrt_lean_libs")
    assert specification is not None
    assert specification.origin is not None
    lean = Path(specification.origin).parent / f"libnvinfer_lean.so.{version}"
    ctypes.CDLL(str(lean), mode=ctypes.RTLD_GLOBAL)
    for library, names in MISSING.items():
        file_name = f"lib{library}.so.{version}"
        source = folder / f"{library}.c"
        source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in names))
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file_name}", str(source), "-o", str(folder / file_name)]
        if library == "nvinfer":
            command += ["-Wl,--no-as-needed", str(lean)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(folder / file_name), mode=ctypes.RTLD_GLOBAL)
    # `tensorrt` is only a wrapper around the bindings; its submodules import it by that name.
    specification = importlib.util.find_spec("tensorrt_bindings")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["tensorrt_bindings"] = sys.modules["tensorrt"] = module
    specification.loader.exec_module(module)
    sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")
    return module
