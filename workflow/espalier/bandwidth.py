"""How fast a device reads its memory, and how many tokens a second that allows at most.

A decode step of few rows does little else than read every weight, and the keys and values of all earlier tokens, once:
that bounds its speed, whatever the engine. Definitions for readers: docs/metrics.md.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROCESSORS = Path("/sys/devices/system/cpu")
UNKNOWN_CACHE = 64 * 2**20  # bytes assumed where the system does not say
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
# A buffer is as many times as large as the cache: what is left in it of the last pass is little. On CUDA it is larger,
# so that starting a kernel takes little of its time.
TIMES_CACHE = {"cpu": 4, "cuda": 16}
COLUMNS = 2048  # of the matrix of the matrix-vector product


def last_level_cache(device: str) -> int:
    """Return the bytes of a device's last-level caches, together: what is larger is read from memory each time.

    A CPU has one for each group of cores that share it.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_properties(device).L2_cache_size
    caches = {}
    for file in PROCESSORS.glob("cpu*/cache/index*/size"):  # some machines tell no size
        level, cores, said = (file.with_name(name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
        if size := re.fullmatch(r"(\d+)([KMG]?)", said):
            caches[int(level), cores] = int(size[1]) * UNITS[size[2]]
    last = max((level for level, _ in caches), default=None)
    return sum(size for (level, _), size in caches.items() if level == last) or UNKNOWN_CACHE


class Bandwidth:
    """Measures read bandwidth again and again, on buffers that it keeps: `TIMES_CACHE` caches, twice."""

    def __init__(self, device: str):
        import torch

        self.device = device
        times = TIMES_CACHE[device.partition(":")[0]]
        rows = max(COLUMNS, times * last_level_cache(device) // (4 * COLUMNS))
        self._read = torch.ones(rows, COLUMNS, device=device)
        self._written = torch.ones_like(self._read)  # and not empty: pages that were never written are not in memory
        self._vector = torch.ones(COLUMNS, device=device)

    def measure(self, repeats: int = 3) -> float:
        """Return bytes a second with the threads in use now: the best of several ways, each done `repeats` times.

        The ways are a sum, a product of a matrix and a vector, and a copy, which counts as what it reads and writes.
        """
        return max(moved / timed(work, self.device) for _ in range(repeats) for moved, work in self._ways())

    def _ways(self) -> Iterator[tuple[int, Callable[[], object]]]:
        yield self._read.nbytes, self._read.sum
        yield self._read.nbytes, lambda: self._read.sum(1)
        yield self._read.nbytes, lambda: self._read @ self._vector
        yield 2 * self._read.nbytes, lambda: self._written.copy_(self._read)


def limit(weight_bytes: int, kv_bytes: int, batch: int, bandwidth: float) -> float:
    """Return the most tokens a second that decoding allows: batch · bandwidth / (weight_bytes + kv_bytes).

    A step makes `batch` tokens. It reads every weight once (of the embedding only the rows looked up, which are not
    counted) and the keys and values of all tokens so far of all `batch` rows, `kv_bytes`. `bandwidth` is in bytes a
    second. Activations are left out, so that no engine reaches it.
    """
    return batch * bandwidth / (weight_bytes + kv_bytes)


def timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds of a work on the device alone, which a GPU is still busy before."""
    import torch

    if not device.startswith("cuda"):
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000_000)  # cycles: meanwhile the work is queued, so that the time to launch it does not count
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
