"""Memory that is true: what a model occupies after loading, and the peak while it works.

On CUDA the allocator keeps these figures. On a CPU there is no such counter, and the process's resident size is mostly
libraries, so bytes alive and their peak are taken from torch itself: the bytes of every live tensor's storage, and the
allocations and frees that torch's profiler records. Definitions for readers: docs/metrics.md.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable


def allocated_bytes(device: str) -> int:
    """Return the bytes of all tensors alive on the device: weights, buffers, and whatever else is held.

    On a CPU these are the storages of all tensors that Python can see, each once, wherever they hang (such as in a
    quantized weight's state). A storage that is only partly in use counts whole. Sparse tensors, and what a library
    keeps in objects of C++, such as torch.ao's prepacked weights, are not seen.
    """
    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # cuBLAS keeps 8 to 32 MiB of the allocator's bytes once it has worked
        return torch.cuda.memory_allocated()
    storages = {}
    for item in gc.get_objects():
        # A plain isinstance would run __class__ of lazy proxies that some libraries leave about.
        if not issubclass(type(item), torch.Tensor):
            continue
        try:
            if item.device.type == "cpu":
                if item.layout == torch._mkldnn:  # in oneDNN's own order: it has memory, but no storage with an address
                    storages[-id(item)] = item.numel() * item.itemsize
                else:
                    storage = item.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        except (RuntimeError, NotImplementedError):
            continue  # a wrapper, whose parts are seen by themselves, or a sparse tensor
    storages.pop(0, None)  # a storage without memory
    return sum(storages.values())


def kinds(device: str) -> tuple[str, ...]:
    """Return what `peaks` measures on the device."""
    return ("allocated", "reserved") if device.startswith("cuda") else ("allocated",)


def peaks(work: Callable[[], object], device: str, before: int | None = None) -> dict[str, int]:
    """Run `work` and return the peak bytes on the device of each of `kinds`, those held before it included.

    "allocated" are bytes of tensors. "reserved", on CUDA alone, is what torch's allocator holds of the device for
    them: its cache is emptied before `work`, so that what earlier work has left there does not count.

    On a CPU this profiles `work`, which slows it: never time the same run. `before` may be given by a caller who knows
    it, because counting takes most of a second. Two limits there: tensors that were alive before `work` count as alive
    to its end, even where it frees them; and what other threads allocate does not count.
    """
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    before = allocated_bytes(device) if before is None else before
    return {"allocated": before + highest_level(_allocations(work))}


def highest_level(changes: Iterable[int]) -> int:
    """Return the highest sum that allocations (positive) and frees (negative), in order, ever reach; at least 0."""
    level = peak = 0
    for change in changes:
        level += change
        peak = max(peak, level)
    return peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the host, had no memory left."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("not enough memory", "can't allocate memory", "out of memory")
    )


def _allocations(work: Callable[[], object]) -> list[int]:
    """Run `work` and return the bytes of each allocation and (negative) free of this thread, in order.

    The profiler's public form also records every operation, which makes a small model's generation fifty times slower.
    This one records a scope in which nothing runs here, so that only the allocator's events are left.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself on every start
    from torch._C import _autograd
    from torch._C import _profiler as c

    config = c.ProfilerConfig(c.ProfilerState.KINETO, False, True, False, False, False, c._ExperimentalConfig())
    activities = {c.ProfilerActivity.CPU}
    _autograd._prepare_profiler(config, activities)
    _autograd._enable_profiler(config, activities, {c.RecordScope.LITE_INTERPRETER})
    try:
        work()
    finally:
        found = _autograd._disable_profiler()
    events = [event for event in found.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
