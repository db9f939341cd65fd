from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import pytest

from asag.runtime.machine import describe_machine, processor_load


def test_the_clocks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a driver's tool that answers what was asked, in the order asked."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        """#!/bin/sh
case "$1" in
  --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem)
    echo "A GPU, 580.10, 1560 MHz, 2100 MHz, 7000 MHz";;
  *) exit 1;;
esac
"""
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    machine = describe_machine()
    assert machine.gpus == ("A GPU (driver 580.10, 1560 MHz of 2100 MHz, memory 7000 MHz)",)
    assert machine.gpus[0] in machine.summary()
    assert machine.clock_mhz is None or 100 < machine.clock_mhz < 10_000
    assert "at 2600 MHz, " in dataclasses.replace(machine, clock_mhz=2600.4).summary()
    assert "MHz, memory" not in dataclasses.replace(machine, clock_mhz=None, gpus=()).summary()


def test_words_in_place_of_gpus_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'No devices were found'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert describe_machine().gpus == ()


def test_a_busy_machine_is_said_to_be_busy() -> None:
    machine = dataclasses.replace(describe_machine(1.4), cores=2)
    assert machine.busy == ""
    assert "busy" not in machine.summary()
    assert dataclasses.replace(machine, load=None).busy == ""
    assert (
        dataclasses.replace(machine, load=3.14)
        .summary()
        .endswith("; busy before the measurement (load 3.1), so times are rough")
    )
    load = processor_load()
    assert load is None or 0 <= load < 10_000
