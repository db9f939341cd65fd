"""`scripts/gpu_check.sh` from beginning to end: without a GPU, and with a played one, where stand-ins do the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
CHECKPOINT = ROOT / "checkpoints" / "asag-a-tiny.safetensors"

# In place of Python: answers what is asked with -c, else notes its arguments and writes the files that they name.
STAND_IN = """#!{python} -IS
import json, os, sys, time
from pathlib import Path

arguments = sys.argv[1:]
command = " ".join(arguments)
if arguments[0] == "-c":
    if "find_spec" in arguments[1]:
        print(*(f", no Python module {{name}}" for name in arguments[2:] if name == os.environ.get("LACKING")), end="")
    else:
        print(json.dumps({{"gpus": ["Played GPU"], "versions": {{"torch": "2.11.0+cu130"}}}}))
    sys.exit()
with Path({notes!r}).open("a") as notes:
    notes.write(json.dumps({{"arguments": arguments, "path": os.environ["PYTHONPATH"]}}) + "\\n")
if (slow := os.environ.get("SLOW")) and slow in command:
    time.sleep(60)
for option, path in zip(arguments, arguments[1:]):
    if option in ("--json", "--output", "-o", "--junitxml", "--report"):
        Path(path).write_text("{{}}") if "." in Path(path).name else Path(path).mkdir()
if "synthetic" in arguments:
    Path(arguments[arguments.index("synthetic") + 1], "val2017").mkdir(parents=True)
if " train --preset" in command:
    folder = Path(arguments[arguments.index("-o") + 1])
    for name in ("weights.safetensors", "training.csv"):
        (folder / name).write_text("")
print("3 skipped in 0.1s" if "tests/runtime" in command else "done")
if (broken := os.environ.get("BROKEN")) and broken in command:
    sys.exit('said \\x1b[31m"this" \\\\ and Ümläut')
"""


class Played:
    """A folder of programs in front of the real ones, and the folder of results."""

    def __init__(self, folder: Path, gpu: bool) -> None:
        self.output, self.notes = folder / "the results", folder / "notes"
        programs = folder / "programs"
        programs.mkdir()
        self.environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        self.environment.pop("PYTHONPATH", None)
        python = programs / "python3"
        python.write_text(STAND_IN.format(python=sys.executable, notes=str(self.notes)))
        said = {"nvidia-smi": "GPU 0: Played GPU" if gpu else "no devices", "find": "", "compute-sanitizer": ""}
        for name, text in said.items():
            (programs / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        for path in programs.iterdir():
            path.chmod(0o755)
        if not gpu:
            self.environment["PYTHON"] = sys.executable

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(SCRIPT), str(self.output), *map(str, arguments)]
        settings = {**self.environment, **environment}
        return subprocess.run(command, env=settings, cwd="/", capture_output=True, text=True, check=False, timeout=120)

    def steps(self) -> dict[str, dict[str, Any]]:
        content = json.loads((self.output / "summary.json").read_text())
        return {step["step"]: step for step in content["steps"]}

    def commands(self) -> list[list[str]]:
        return [json.loads(line)["arguments"] for line in self.notes.read_text().splitlines()]


@pytest.fixture
def played(tmp_path: Path) -> Played:
    return Played(tmp_path, gpu=True)


def test_without_a_gpu_every_step_is_skipped_and_says_why(tmp_path: Path) -> None:
    played = Played(tmp_path, gpu=False)
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = played.run()
    assert result.returncode == 2, result.stderr
    assert result.stderr == "no step ran\n"
    steps = played.steps()
    assert len(steps) > 15
    for step in steps.values():
        assert step["status"] == "skipped"
        assert step["reason"].startswith("no NVIDIA GPU")
    machine = json.loads((played.output / "summary.json").read_text())["machine"]
    assert {"torch", "onnxruntime", "python"} <= set(machine["versions"])
    assert machine["gpus"] == []


def test_with_a_gpu_every_step_runs(played: Played, tmp_path: Path) -> None:
    coco = tmp_path / "photographs"
    (coco / "annotations").mkdir(parents=True)
    (coco / "annotations" / "instances_train2017.json").write_text("{}")
    result = played.run(CHECKPOINT, coco, ONLY="", TIME_LIMIT="")
    steps = played.steps()
    assert {name for name, step in steps.items() if step["status"] != "ok"} == {"tests-runtime"}
    assert steps["tests-runtime"]["reason"] == "every test was skipped; see logs/tests-runtime.log"
    assert result.returncode == 0, result.stdout
    for name in ("kernels-SamplingMixing", "pytorch", "pytorch-half", "bench", "parity", "trt-parity", "profile"):
        assert (played.output / f"{name}.json").is_file()
    assert (played.output / "training.csv").is_file()
    assert json.loads((played.output / "summary.json").read_text())["machine"]["versions"]["torch"] == "2.11.0+cu130"

    # Scripts find the rooms though nothing is installed, and both engines are compared.
    assert json.loads(played.notes.read_text().splitlines()[0])["path"] == str(ROOT)
    compared = next(command for command in played.commands() if f"{played.output}/trt-parity.json" in command)
    assert [Path(argument).name for argument in compared[3:6]] == [
        CHECKPOINT.name,
        "tensorrt.engine",
        "tensorrt-int8.engine",
    ]


def test_a_step_that_breaks_stops_no_other(played: Played) -> None:
    only = "kernels-AdaptiveProbing kernels-GatherAnchors rtx-build trt-build data export parity trt-parity"
    result = played.run(ONLY=only, BROKEN="AdaptiveProbing", LACKING="tensorrt_rtx_bindings")
    assert result.returncode == 1
    steps = played.steps()
    assert set(steps) == set(only.split())
    broken = steps["kernels-AdaptiveProbing"]
    assert (broken["status"], broken["exit_code"]) == ("failed", 1)
    assert broken["said_last"] == "said [31mthis  and mlut"
    assert steps["rtx-build"]["reason"] == "no Python module tensorrt_rtx_bindings"
    others = {name for name, step in steps.items() if step["status"] == "ok"}
    assert others == set(only.split()) - {"kernels-AdaptiveProbing", "rtx-build"}
    # The model is compared without the engine that was not built.
    compared = next(command for command in played.commands() if f"{played.output}/parity.json" in command)
    assert [Path(argument).name for argument in compared[3:5]] == [CHECKPOINT.name, "model.onnx"]
    assert not any("model.engine" in argument for argument in compared)

    # What failed runs again alone; what was found stays.
    assert played.run(ONLY="kernels-AdaptiveProbing").returncode == 0
    again = played.steps()
    assert again.pop("kernels-AdaptiveProbing")["status"] == "ok"
    assert again == {name: step for name, step in steps.items() if name in again}


def test_time_runs_out(played: Played) -> None:
    start = time.monotonic()
    result = played.run(ONLY="kernels-GatherAnchors data export", SLOW="GatherAnchors", TIME_LIMIT="2")
    assert result.returncode == 1
    assert time.monotonic() - start < 30
    steps = played.steps()
    assert steps["kernels-GatherAnchors"]["status"] == "failed"
    assert steps["kernels-GatherAnchors"]["reason"].startswith("stopped after")
    assert {steps[name]["reason"] for name in ("data", "export")} == {"no time left of 2 s"}


def test_wrong_arguments_are_one_line(played: Played, tmp_path: Path) -> None:
    assert "no file" in played.run(CHECKPOINT, tmp_path).stderr
    result = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "name a folder for the results\n")
