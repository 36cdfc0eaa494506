"""Whether anything else worked on the machine while this process, with all that it started, timed something.

Others' share of the CPU is counted by the system, in ticks of 10 ms of each core: /proc/stat has the busy time of all
cores, /proc/PID/stat that of each process. On a GPU NVIDIA's library lists the processes that have work there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from espalier import nvml

MARK = "ESPALIER_RUN"  # in the environment of all processes of a run: its folder and study
PROC = Path("/proc")
IDLE = (3, 4)  # of the times in /proc/stat: idle, and waiting for input or output
TICK = 1 / os.sysconf("SC_CLK_TCK")


class Process(NamedTuple):
    """One line of /proc/PID/stat: its parent, and the CPU seconds of itself and of the children that it waited for."""

    parent: int
    seconds: float


class Look(NamedTuple):
    """What the system had counted at one moment, in CPU seconds of all cores, and who was there."""

    capacity: float  # busy or idle
    busy: float  # of anyone, that of other virtual machines on the same cores (steal) included
    own: float  # of this process and all that it started
    jobs: frozenset[str]  # other jobs of the same run
    on_gpu: frozenset[int] | None  # processes of others; None where that is not known


class Watch:
    """Adds up what others did in the stretches that `during` surrounds, and who they were."""

    def __init__(self, device: str):
        self.gpu = None if device == "cpu" else nvml.first_gpu()
        self.capacity = self.others = 0.0
        self.jobs: set[str] = set()

    @contextlib.contextmanager
    def during(self) -> Iterator[dict]:
        """Yield a mapping that is filled when the block ends: cpu_of_others, and with a GPU gpu_processes_of_others.

        The first is the share of all cores' time that others had, the second how many processes; None is not known.
        """
        found: dict = {}
        before = self._look()
        yield found
        after = self._look()
        capacity = after.capacity - before.capacity
        others = max(0.0, after.busy - before.busy - (after.own - before.own))
        self.capacity, self.others = self.capacity + capacity, self.others + others
        self.jobs |= before.jobs | after.jobs
        found["cpu_of_others"] = share(others, capacity)
        if self.gpu:
            known = before.on_gpu is not None and after.on_gpu is not None
            found["gpu_processes_of_others"] = len(before.on_gpu | after.on_gpu) if known else None

    def cpu_of_others(self) -> float | None:
        """Return the share of all cores' time that others had in all stretches together; None if it is not known."""
        return share(self.others, self.capacity)

    def _look(self) -> Look:
        processes = _processes()
        own = _descendants(os.getpid(), processes)
        capacity, busy = _machine()
        seconds = sum(processes[pid].seconds for pid in own)
        return Look(capacity, busy, seconds, _jobs(processes), self._on_gpu(own))

    def _on_gpu(self, own: set[int]) -> frozenset[int] | None:
        if self.gpu is None:
            return None
        pynvml, handle = self.gpu
        try:
            there = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        except pynvml.NVMLError:
            return None
        # In a container NVML may count processes otherwise than /proc does: then not even the own ones are found.
        return frozenset(there - own) if there & own else None


def share(others: float, capacity: float) -> float | None:
    """Return others / capacity, at most 1; None where no time was counted."""
    return min(1.0, others / capacity) if capacity > 0 else None


def _machine() -> tuple[float, float]:
    """Return the seconds of all cores together since the machine started, and how many of them were busy."""
    times = [int(part) for part in (PROC / "stat").read_text().partition("\n")[0].split()[1:9]]
    return sum(times) * TICK, sum(time for place, time in enumerate(times) if place not in IDLE) * TICK


def _processes() -> dict[int, Process]:
    found = {}
    for file in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # ended meanwhile
            fields = file.read_text(errors="replace").rpartition(")")[2].split()  # the name may hold anything
            ticks = sum(int(part) for part in fields[11:15])
            found[int(file.parent.name)] = Process(int(fields[1]), ticks * TICK)
    return found


def _descendants(root: int, processes: dict[int, Process]) -> set[int]:
    """Return `root` and all that it started, of those that are there."""
    children: dict[int, list[int]] = {}
    for pid, process in processes.items():
        children.setdefault(process.parent, []).append(pid)
    found, queue = set(), [root]
    while queue:
        pid = queue.pop()
        if pid in processes and pid not in found:
            found.add(pid)
            queue += children.get(pid, [])
    return found


def _jobs(processes: dict[int, Process]) -> frozenset[str]:
    """Return the commands of other jobs of this process's run: of each the first process that carries its mark.

    The main process of a run does not carry it: it marks what it starts.
    """
    mark = os.environ.get(MARK)
    if mark is None:  # a job that was started by hand
        return frozenset()
    marked = {pid for pid in processes if f"{MARK}={mark}".encode() in _read(pid, "environ").split(b"\0")}

    def first(pid: int) -> int:
        while pid in processes and processes[pid].parent in marked:
            pid = processes[pid].parent
        return pid

    others = {first(pid) for pid in marked} - {first(os.getpid())}
    return frozenset(_command(pid) for pid in others)


def _command(pid: int) -> str:
    words = _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").split()
    return f"process {pid}: {' '.join(words)[:300]}"


def _read(pid: int, name: str) -> bytes:
    try:
        return (PROC / str(pid) / name).read_bytes()
    except OSError:  # ended meanwhile, or another user's
        return b""
