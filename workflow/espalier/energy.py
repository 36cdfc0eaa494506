"""Energy in joules, of devices that count it: NVML's total of a GPU, RAPL's of a CPU's sockets and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from espalier import nvml

POWERCAP = Path("/sys/class/powercap")


def counter(device: str) -> Callable[[], float] | None:
    """Return a function that says how many joules the device has used since some moment before; None if it cannot.

    On CUDA it is the GPU that CUDA shows first, all of it, whoever works there; on a CPU all sockets of the machine.
    """
    return _of_gpu() if device.startswith("cuda") else _of_sockets(POWERCAP)


def _of_gpu() -> Callable[[], float] | None:
    gpu = nvml.first_gpu()
    if gpu is None:
        return None
    pynvml, handle = gpu
    try:
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:  # a GPU before Volta, or a part of one
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _of_sockets(folder: Path) -> Callable[[], float] | None:
    """Return the counter of RAPL's zones: sockets ("package-0") and, where it is counted beside them, memory ("dram").

    Each zone counts microjoules and begins again at its range, after some minutes of full load; a call that takes
    longer than that would lose whole ranges.
    """
    zones = []
    try:
        for zone in sorted(folder.glob("intel-rapl:*")):  # the name on AMD's CPUs too
            if (zone / "name").read_text().strip().startswith(("package", "dram")):
                zones.append(_Zone(zone))
    except (OSError, ValueError):  # most systems let only root read it
        return None
    return (lambda: sum(zone.joules() for zone in zones)) if zones else None


class _Zone:
    def __init__(self, folder: Path):
        self.file = folder / "energy_uj"
        self.range = int((folder / "max_energy_range_uj").read_text())
        self.last, self.total = int(self.file.read_text()), 0

    def joules(self) -> float:
        now = int(self.file.read_text())
        self.total += now - self.last if now >= self.last else now - self.last + self.range
        self.last = now
        return self.total / 1e6
