"""`python -m benchmarks.latency` on the CPU: all but CUDA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.latency import main

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints" / "asag-a-tiny.safetensors"


def test_ways_take_turns_and_reasons_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: torch.nn.Module) -> None:
        raise RuntimeError("no compiler here\nmore lines")

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    path = tmp_path / "latency.json"
    arguments = [str(CHECKPOINT), "--device", "cpu", "--rounds", "3", "--batch-size", "2", "--json", str(path)]
    result = CliRunner().invoke(main, arguments)
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
    assert found["batch_size"] == 2
    assert torch.__version__.startswith(found["machine"]["versions"]["torch"])
    assert "not run" in result.output


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = CliRunner().invoke(main, [str(CHECKPOINT)])
    assert result.exit_code == 1
    assert result.output.startswith("Error: needs an NVIDIA GPU")
