"""`python -m benchmarks.gpu_check`: its rehearsals on a CPU, and what it makes of steps that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Request, Step, main


def steps_in(folder: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((folder / "summary.json").read_text())
    return {step["step"]: step for step in content["steps"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "left_out", "skipped"), [("speed", ("whole", "whole-batch", "tiny"), 7), ("train", (), 0)]
)
def test_a_rehearsal_runs_the_steps_that_need_no_gpu(
    run: str, left_out: tuple[str, ...], skipped: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but those `left_out`, whose command another step has with other options."""
    names = [step.name for step in gpu_check.RUNS[run](Request(tmp_path, "cpu", None)) if step.name not in left_out]
    assert main([run, str(tmp_path), "--device", "cpu", "--only", *names]) == 0, capsys.readouterr().out
    found = steps_in(tmp_path)
    assert list(found) == names
    left = {step["step"]: step["reason"] for step in found.values() if step["status"] == "skipped"}
    assert len(left) == skipped
    assert set(left.values()) <= {"needs a GPU"}
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-len(found) :]] == list(found), "the last lines are the table"


def test_the_tests_for_a_gpu_are_found(tmp_path: Path) -> None:
    assert main(["smoke", str(tmp_path), "--device", "cpu", "--only", "facts", "kernels"]) == 0
    assert "tests collected" in steps_in(tmp_path)["kernels"]["said_last"]


def test_each_run_ends_by_itself() -> None:
    """The limits of the most valuable steps fit: what is cut off by the run's own limit comes last."""
    for name, run in gpu_check.RUNS.items():
        steps = run(Request(Path("results"), "cuda", Path("coco")))
        assert len({step.name for step in steps}) == len(steps)
        if name != "engines":
            assert max(step.seconds for step in steps) <= 130
            assert sum(step.seconds for step in steps[:2]) <= gpu_check.RUN_SECONDS


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["smoke", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "no NVIDIA GPU that PyTorch can use; --device cpu rehearses\n"


def test_an_unknown_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["smoke", str(tmp_path), "--device", "cpu", "--only", "kernel"])
    assert caught.value.code == 2
    assert "no step kernel in smoke; there are detectors, facts, kernels" in capsys.readouterr().err


def test_a_step_that_breaks_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def played(request: Request) -> list[Step]:
        made = request.work / "made"
        return [
            Step("breaks", 20, ("-c", "print('first'); raise SystemExit('said last')")),
            Step("hangs", 0.3, ("-c", "import time; time.sleep(60)")),
            Step("lacks", 20, ("-c", ""), ("no_such_module", "command:no-such-command", made)),
            Step("makes", 20, ("-c", f"open({str(made)!r}, 'w'); print('made\\n└──┘')")),
            Step("uses", 20, ("-c", "import benchmarks; print('found')"), ("json", made)),
        ]

    monkeypatch.setitem(gpu_check.RUNS, "smoke", played)
    monkeypatch.chdir("/")
    arguments = ["smoke", str(tmp_path), "--device", "cpu"]
    assert main(arguments) == 1
    found = steps_in(tmp_path)
    assert {name: step["status"] for name, step in found.items()} == {
        "breaks": "failed",
        "hangs": "failed",
        "lacks": "skipped",
        "makes": "ok",
        "uses": "ok",
    }
    assert found["breaks"]["reason"] == "exit code 1: said last"
    assert found["hangs"]["reason"] == "stopped after 2 s"
    assert found["lacks"]["reason"] == "no Python module no_such_module, no command no-such-command, no file made"
    assert found["makes"]["said_last"] == "made"

    assert main([*arguments, "--only", "uses"]) == 0
    assert set(steps_in(tmp_path)) == set(found), "what earlier runs found stays"
    assert main([*arguments, "--time-limit", "0.5"]) == 2
    assert {step["reason"] for name, step in steps_in(tmp_path).items() if name != "lacks"} == {"no time left"}


def test_tests_that_were_all_skipped_are_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_one.py").write_text("import pytest\ndef test_one():\n    pytest.skip('no reason')\n")
    step = Step("tests", 60, ("-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path / "test_one.py"))
    runner = gpu_check.Runner(Request(tmp_path / "out", "cuda", None), 60)
    outcome = runner.run(step)
    assert (outcome.status, outcome.exit_code) == ("skipped", 0)
    assert outcome.reason.startswith("no test ran: 1 skipped")
