"""Fixtures that several rooms share, and the skip of tests that need a GPU."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Several test processes on a few cores would spend their time waiting for one another's threads. Set before PyTorch
# is imported, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# A busy machine makes an example slow now and then; that is no failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Data beside the checkout that is not part of the project.
SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"needs {name} in a folder `shared` beside the checkout")
    return path


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels that these tests compile are kept for this run, and for all of its processes together."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASAG_KERNEL_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of the golden cases."""
    return _shared("goldens")


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    """Folder of a small COCO dataset of photographs."""
    return _shared("data/coco_tiny")


def pytest_runtest_setup(item: pytest.Item) -> None:
    # A test that asked PyTorch for more threads must not leave them to the next: sums would be added in another order.
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # TensorRT-RTX's builder does not start in a process that has loaded the bindings as the kernels' tests do.
    items.sort(key=lambda item: item.path.parent.name == "trt_plugins")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _no_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU: {reason}"))


def _no_gpu() -> str | None:
    """Why there is no GPU, or None where the driver has one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver on this machine"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver sees no GPU"
    return None
