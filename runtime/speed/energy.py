"""Energy that an NVIDIA GPU takes, from the driver's counter."""

from __future__ import annotations

import ctypes


class EnergyMeter:
    """Reads the total energy counter of one GPU through the driver's management library."""

    def __init__(self, library: ctypes.CDLL, device: ctypes.c_void_p) -> None:
        self._library, self._device = library, device

    @classmethod
    def open(cls, index: int = 0) -> EnergyMeter | None:
        """The meter of GPU ``index``; None without a driver, without that GPU, or where it has no counter."""
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return None
        device = ctypes.c_void_p()
        if library.nvmlInit_v2() != 0 or library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
            return None
        meter = cls(library, device)
        return meter if meter._read() is not None else None

    def joules(self) -> float:
        """Energy since the driver was loaded. Raises RuntimeError when the counter cannot be read any more."""
        millijoules = self._read()
        if millijoules is None:
            raise RuntimeError("the GPU's energy counter cannot be read")
        return millijoules / 1e3

    def _read(self) -> int | None:
        value = ctypes.c_ulonglong()
        status = self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value))
        return value.value if status == 0 else None
