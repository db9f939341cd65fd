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

_PACKAGES = ("asag", "numpy", "pillow", "torch", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13-bindings")


@dataclasses.dataclass(frozen=True)
class Machine:
    """The processor, number of usable cores, memory in GiB (None where unknown), GPUs, system, versions and date."""

    processor: str
    cores: int
    memory_gib: float | None
    gpus: tuple[str, ...]
    system: str
    versions: dict[str, str]
    date: str

    def summary(self) -> str:
        """One line for below a table."""
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.0f} GiB"
        return f"{self.processor}, {self.cores} cores{memory}, {', '.join(self.gpus) or 'no GPU'}; {self.date}"

    def to_json(self) -> dict[str, Any]:
        """The description as JSON values."""
        return dataclasses.asdict(self)


def describe_machine() -> Machine:
    """Describe this machine now, without importing any backend."""
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=_memory_gib(),
        gpus=_gpus(),
        system=f"{platform.system()} {platform.machine()}",
        versions={"python": platform.python_version(), **_versions()},
        date=datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> tuple[str, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.replace(", ", " (driver ") + ")" for line in listing.splitlines() if line.strip())


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
