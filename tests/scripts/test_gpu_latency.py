"""`scripts/gpu_latency.py` on the CPU: all but CUDA."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints" / "asag-a-tiny.safetensors"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("gpu_latency", ROOT / "scripts" / "gpu_latency.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_ways_take_turns_and_reasons_are_kept(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: torch.nn.Module) -> None:
        raise RuntimeError("no compiler here\nmore lines")

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    path = tmp_path / "latency.json"
    arguments = [str(CHECKPOINT), "--device", "cpu", "--rounds", "3", "--batch-size", "2", "--json", str(path)]
    result = CliRunner().invoke(script.main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert found["not_measured_because"] == {
        "torch.compile of backbone and neck": "no compiler here",
        "kernels in a CUDA graph": "CUDA graphs need a GPU",
        "backbone and neck alone, in a CUDA graph": "CUDA graphs need a GPU",
    }
    assert set(found["milliseconds"]) == {"eager"}
    eager = found["milliseconds"]["eager"]
    assert 0 < eager["low"] <= eager["median"] <= eager["high"]
    assert len(found["rounds_milliseconds"]["eager"]) == 3
    assert found["of_eager"]["eager"]["median"] == 1
    assert (found["batch_size"], found["machine"]["torch"]) == (2, torch.__version__)
    assert "not run" in result.output


def test_a_definition_takes_the_place_of_a_kernel() -> None:
    """What `definitions_only` relies on: a kernel can be set aside for a while."""

    @torch.library.custom_op("asag_tests::which", mutates_args=())
    def which(value: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(value)

    which.register_kernel("cpu")(torch.ones_like)
    value = torch.rand(1)
    assert which(value) == 1
    with torch.inference_mode(), which.set_kernel_enabled("cpu", enabled=False):
        assert which(value) == 0
    assert which(value) == 1


def test_without_a_gpu_it_says_so(script: ModuleType) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = CliRunner().invoke(script.main, [str(CHECKPOINT)])
    assert result.exit_code == 1
    assert result.output.startswith("Error: needs an NVIDIA GPU")
