"""Instructions per image on the CPU around the network: a number that neither load nor clock changes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.counted_work import WATCHED, workloads

ROOT = Path(__file__).parents[3]

LIMITS = {"prepare": 1.05, "non_maximum_suppression": 0.99, "postprocess": 0.45}
"""Instructions over those of the reference in the same run; a tenth above what was measured, `prepare` less."""

LEAST_WORK = 10_000
"""Instructions; what callgrind counts between the parts of the watched function itself is a few dozen."""


def count_instructions(folder: Path) -> dict[str, int]:
    """Instructions of each workload, counted by one run of callgrind."""
    command = ["valgrind", "--tool=callgrind", f"--dump-before={WATCHED}", f"--callgrind-out-file={folder / 'counts'}"]
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        **{"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)},
    }
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.runtime.counted_work"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    totals = {}
    for path in folder.glob("counts.*"):
        total = re.search(r"^totals: (\d+)", path.read_text(), re.MULTILINE)
        assert total is not None
        totals[int(path.suffix[1:])] = int(total[1])
    parts = [totals[number] for number in sorted(totals) if totals[number] >= LEAST_WORK]
    names = ["start", *workloads()]
    assert len(parts) == len(names), "the watched function was not seen at each of its calls"
    return dict(zip(names, parts, strict=True))


@pytest.mark.slow
def test_instructions_per_image(tmp_path: Path) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("counting instructions needs valgrind")
    counts = count_instructions(tmp_path)
    ratios = {name: counts[name] / counts[f"{name} reference"] for name in LIMITS}
    assert all(ratios[name] <= limit for name, limit in LIMITS.items()), (ratios, counts)
