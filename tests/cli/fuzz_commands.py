"""Runs commands on damaged files and prints what went wrong; a process of its own, for the case that it dies.

``python -m tests.cli.fuzz_commands FOLDER CASES SEED`` on a folder of good files. Every case is announced in
``FOLDER/case.txt`` before it runs; the findings are printed as JSON, one list of [case, what happened].
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np

from asag.cli.main import main
from tests.cli.damage import damage, damage_json

MODEL = "--model"


def commands(folder: Path, output: Path) -> dict[str, list[list[object]]]:
    """What runs on each damaged file, by its name."""
    image = folder / "image.png"
    here = folder / "damaged"
    detect = ["detect", image, "-o", output, "--threads", 1, MODEL]
    serve = ["serve-repository", here / "toy.engine", "-o", output / "repository"]
    return {
        "toy.onnx": [
            [*detect, here / "toy.onnx"],
            [*detect, here / "toy.onnx"],
            ["inspect", here / "toy.onnx"],
            ["build", here / "toy.onnx", "-o", output / "new.engine", "--batch", "1"],
            ["build", here / "toy.onnx", "-o", output / "new.engine", "--batch", "1", "--precision", "fp16"],
            ["quantize", here / "toy.onnx", "-o", output / "int8.onnx", "--calibration", folder],
            ["serve-repository", here / "toy.onnx", "-o", output / "repository"],
        ],
        "toy.engine": [[*detect, here / "toy.engine"], ["inspect", here / "toy.engine"], serve],
        "toy.engine.json": [[*detect, here / "toy.engine"], ["inspect", here / "toy.engine"], serve],
        "model.safetensors": [[*detect, here / "model.safetensors"], ["inspect", here / "model.safetensors"]],
        "image.png": [["detect", here / "image.png", "-o", output, MODEL, folder / "toy.onnx", "--threads", 1]],
        "image.jpg": [["detect", here / "image.jpg", "-o", output, MODEL, folder / "toy.onnx", "--threads", 1]],
        "clip.mp4": [["detect", here / "clip.mp4", "-o", output, MODEL, folder / "toy.onnx", "--threads", 1]],
    }


def run(arguments: list[object]) -> tuple[int | str, str]:
    """Exit code and standard error of a command in this process; the traceback instead of a code where it has one."""
    output, error = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            main([str(argument) for argument in arguments])
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else str(ending.code), error.getvalue()
    except BaseException:
        return traceback.format_exc(limit=-6), error.getvalue()
    return "no exit", error.getvalue()


def complaint(code: int | str, error: str) -> str | None:
    """What is wrong with how a command ended: done, or one line and code 2."""
    # What a folder holds beside pictures is told apart.
    lines = [line for line in error.splitlines() if "that are no images: " not in line]
    if code == 0:
        return None if not lines else f"code 0, but said {error[:300]!r}"
    if code != 2:
        return f"ended with {code}"
    if len(lines) != 1 or not lines[0].startswith("asag: ") or len(lines[0]) > 700:
        return f"not one clear line: {error[:600]!r}"
    return None


def fuzz(folder: Path, cases: int, seed: int) -> list[tuple[str, str]]:
    """The complaints about ``cases`` damaged files, spread evenly over the good files of the folder."""
    warnings.simplefilter("ignore")
    output, damaged = folder / "out", folder / "damaged"
    table = {name: lines for name, lines in commands(folder, output).items() if (folder / name).exists()}
    found = []
    for number in range(cases):
        generator = np.random.default_rng((seed, number))
        name = sorted(table)[number % len(table)]
        for place in (damaged, output):
            shutil.rmtree(place, ignore_errors=True)
        damaged.mkdir()
        if name.startswith("toy.engine"):
            for other in ("toy.engine", "toy.engine.json"):
                shutil.copy(folder / other, damaged)
        content = (folder / name).read_bytes()
        change = damage_json if name.endswith(".json") else damage
        (damaged / name).write_bytes(change(content, generator))
        lines = table[name]
        line = lines[number // len(table) % len(lines)]
        case = f"seed {seed}, case {number}: {line[0]} on damaged {name}"
        (folder / "case.txt").write_text(case)
        problem = complaint(*run(line))
        if problem is not None:
            found.append((case, problem))
            if len(sys.argv) > 4:
                shutil.copy(damaged / name, Path(sys.argv[4]) / f"{number}-{name}")
    return found


if __name__ == "__main__":
    print(json.dumps(fuzz(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
