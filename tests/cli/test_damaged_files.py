"""A thousand damaged files thrown at the commands: each runs, or ends with one clear line and code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from asag.checkpoint import save_detector
from asag.runtime.engines.build import BuildOptions, build_engine
from asag.runtime.errors import BackendUnavailableError
from tests.builders import random_detector, small_config, small_info
from tests.cli.damage import DAMAGES, damage_json
from tests.cli.fuzz_commands import complaint
from tests.runtime.toy_detector import build_toy_model, toy_metadata

CASES, SEED = 1000, 20261120
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    onnx.save(build_toy_model(toy_metadata()), folder / "toy.onnx")
    save_detector(folder / "model.safetensors", random_detector(small_config()), small_info((64, 64)))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    picture.save(folder / "image.png")
    picture.save(folder / "image.jpg")
    try:
        build_engine(folder / "toy.onnx", folder / "toy.engine", BuildOptions(batch=(1,)))
    except BackendUnavailableError as error:
        print(f"without engines: {error}")
    try:
        import av
    except ImportError:
        print("without videos: PyAV is not installed")
        return folder
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_image(picture.resize((64, 48)))))
        container.mux(stream.encode(None))
    return folder


def test_every_damaged_file_runs_or_is_one_line(good_files: Path) -> None:
    command = [sys.executable, "-m", "tests.cli.fuzz_commands", str(good_files), str(CASES), str(SEED)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the process died at: {(good_files / 'case.txt').read_text()}\n{done.stderr[-2000:]}"
    assert json.loads(done.stdout) == []
    assert done.stderr == "", "libraries wrote past the command to the terminal"


def test_the_damage_is_real_and_reproducible() -> None:
    content = bytes(range(256)) * 4
    for damage in set(DAMAGES):
        changed = [damage(content, np.random.default_rng(seed)) for seed in range(20)]
        assert changed == [damage(content, np.random.default_rng(seed)) for seed in range(20)]
        assert sum(other != content for other in changed) >= 18
    manifest = json.dumps({"a": [1, 2], "b": {"c": 3}}).encode()
    assert len({damage_json(manifest, np.random.default_rng(seed)) for seed in range(50)}) > 25


@pytest.mark.parametrize(
    ("code", "error", "complained"),
    [
        (0, "", False),
        (2, "asag: one line\n", False),
        (0, "asag: but a warning\n", True),
        (2, "", True),
        (2, "asag: one\nasag: two\n", True),
        (2, "Traceback\n", True),
        (1, "asag: one line\n", True),
        ("Traceback", "", True),
    ],
)
def test_what_counts_as_clear(code: int | str, error: str, complained: bool) -> None:
    assert (complaint(code, error) is not None) == complained
