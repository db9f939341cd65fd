"""What machine this is, for tables and reports whose numbers depend on it."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "asag",
    "numpy",
    "pillow",
    "torch",
    "torchvision",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
    "nvidia-cuda-nvrtc",
)

_BUSY = 0.75
"""Share of the cores that other work may have before times are called rough."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The processor, number of usable cores, memory in GiB (None where unknown), GPUs, system, versions and date.

    ``clock_mhz`` is what the processor's fastest core runs at while this is asked (None where the system does not
    tell); each of ``gpus`` says its own. ``load`` is that of the minute before.
    """

    processor: str
    cores: int
    memory_gib: float | None
    gpus: tuple[str, ...]
    system: str
    versions: dict[str, str]
    date: str
    clock_mhz: float | None = None
    load: float | None = None

    @property
    def busy(self) -> str:
        """What other work says of the times measured here; empty on a quiet machine."""
        if self.load is None or self.load < _BUSY * self.cores:
            return ""
        return f"busy before the measurement (load {self.load:.1f}), so times are rough"

    def summary(self) -> str:
        """One line for below a table."""
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.0f} GiB"
        clock = "" if self.clock_mhz is None else f" at {self.clock_mhz:.0f} MHz"
        gpus = ", ".join(self.gpus) or "no GPU"
        return (
            f"{self.processor}, {self.cores} cores{clock}{memory}, {gpus}; {self.date}{self.busy and '; ' + self.busy}"
        )

    def to_json(self) -> dict[str, Any]:
        """The description as JSON values."""
        return dataclasses.asdict(self)


def processor_load() -> float | None:
    """Processes that ran or waited in the last minute, on average; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def describe_machine(load: float | None = None) -> Machine:
    """Describe this machine now, without importing any backend.

    After a measurement, ``load`` is :func:`processor_load` from before it: the measurement's own work is no other's.
    """
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=_memory_gib(),
        gpus=_gpus(),
        system=f"{platform.system()} {platform.machine()}",
        versions={"python": platform.python_version(), **_versions()},
        date=datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        clock_mhz=_clock_mhz(),
        load=load,
    )


def _processor() -> str:
    names = _cpu_info("model name")
    return names[0] if names else platform.processor() or platform.machine()


def _clock_mhz() -> float | None:
    return max(map(float, _cpu_info("cpu MHz")), default=None)


def _cpu_info(field: str) -> list[str]:
    """What the kernel says of each core; nothing where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(field)]


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> tuple[str, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem"
    query = [command, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    # Where there is no GPU, some versions say so in words and call it a success.
    return tuple(_gpu_text(line) for line in listing.splitlines() if line.count(", ") == fields.count(","))


def _gpu_text(line: str) -> str:
    """``name, driver, clock, highest clock, memory clock`` of ``nvidia-smi`` as words."""
    name, driver, clock, highest, memory = line.split(", ")
    return f"{name} (driver {driver}, {clock} of {highest}, memory {memory})"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
