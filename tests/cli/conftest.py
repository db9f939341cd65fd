"""The command line as a function, and the files that commands work on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from asag.cli.main import main
from asag.train.synthetic import CATEGORIES, write_synthetic_dataset
from tests.builders import random_detector, small_config, small_info, write_checkpoint

INPUT_SIZE = (160, 160)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command printed and how it ended."""

    code: int
    output: str
    error: str


Command = Callable[..., Outcome]


@dataclasses.dataclass(frozen=True)
class Workspace:
    """A tiny random model as checkpoint and exported file, one of other classes, and four images to evaluate on."""

    folder: Path
    data: Path
    checkpoint: Path
    other_classes: Path
    model: Path
    exporting: Outcome

    @property
    def images(self) -> list[Path]:
        return sorted((self.data / "val2017").glob("*.jpg"))


def run_asag(*arguments: object) -> Outcome:
    """Run `asag` in this process, as the installed command does."""
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error), pytest.raises(SystemExit) as ending:
        main([str(argument) for argument in arguments])
    code = ending.value.code
    assert isinstance(code, int)
    return Outcome(code, output.getvalue(), error.getvalue())


@pytest.fixture(scope="session")
def asag() -> Command:
    return run_asag


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("workspace")
    data = write_synthetic_dataset(folder / "data", train_images=2, val_images=4, image_size=160, seed=1)
    info = dataclasses.replace(
        small_info(INPUT_SIZE), category_ids=tuple(CATEGORIES), category_names=tuple(CATEGORIES.values())
    )
    detector = random_detector(small_config(num_classes=len(CATEGORIES)))
    checkpoint = write_checkpoint(folder / "model.safetensors", detector, info)
    other_classes = write_checkpoint(folder / "other.safetensors")
    model = folder / "model.onnx"
    exporting = run_asag("export", checkpoint, "-o", model)
    return Workspace(folder, data, checkpoint, other_classes, model, exporting)
