"""Two runs do not share a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from asag.train.run_folder import held_folder


def test_a_second_run_is_kept_out_while_the_first_lives(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with held_folder(folder, True):
        with pytest.raises(ValueError, match=r"another run is training in .*one: wait"), held_folder(folder, True, 0.0):
            pass
        with held_folder(folder, False):  # the first run's other processes
            (folder / "losses.csv").touch()
    with held_folder(folder, True):
        pass
    assert (folder / "losses.csv").exists()


def test_a_folder_of_nothing_is_not_left_behind(tmp_path: Path) -> None:
    with held_folder(tmp_path / "new", True):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"cannot write .*file/new: Not a directory"),
        held_folder(tmp_path / "file" / "new", True),
    ):
        pass
